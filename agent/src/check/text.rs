//! ● The report of `dr-agent check` as text for a terminal at three in the morning.
//!
//! Pure: a [`CheckReport`] and a style in, text out. Grouped by place, worst first, columns aligned, long
//! lines wrapped under their column, the counts on the last line.
//!
//! # Invariants
//! - Every finding has a line of its own; nothing is left out.
//! - A hint that several neighbours share is printed once, after the last of them.
//! - Severity is a word, never a colour alone.

use std::fmt::Write as _;

use super::finding::{CheckReport, Finding, Severity, counted};

/// How wide, and whether with colours.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Columns of the terminal.
    pub width: usize,
    /// ANSI colours.
    pub colour: bool,
}

impl Style {
    /// For a file or a pipe: wide enough to read, without colours.
    pub const PLAIN: Self = Self {
        width: 110,
        colour: false,
    };
}

/// Column of the code, after two spaces and the severity.
const CODE_AT: usize = 11;

/// Lays the report out.
pub fn render(report: &CheckReport, style: Style) -> String {
    let mut text = String::new();
    let code_width = report
        .findings
        .iter()
        .map(|f| f.code.len())
        .max()
        .unwrap_or(0);
    let body_at = CODE_AT + code_width + 2;
    let mut place = None;
    for (index, finding) in report.findings.iter().enumerate() {
        let here = (finding.side, &finding.database);
        if place != Some(here) {
            if place.is_some() {
                text.push('\n');
            }
            text.push_str(&paint(&heading(finding), "1", style));
            text.push('\n');
            place = Some(here);
        }
        line(&mut text, finding, code_width, body_at, style);
        let next = report.findings.get(index + 1);
        if let Some(hint) = &finding.hint
            && !next.is_some_and(|next| shares_hint(finding, next))
        {
            wrapped(&mut text, "-> ", hint, body_at, style.width);
        }
    }
    if !report.findings.is_empty() {
        text.push('\n');
    }
    text.push_str(&summary(report, style));
    text.push('\n');
    text
}

fn heading(finding: &Finding) -> String {
    match &finding.database {
        Some(database) => format!("{}, database {database}", finding.side.as_str()),
        None => finding.side.as_str().to_owned(),
    }
}

fn line(text: &mut String, finding: &Finding, code_width: usize, body_at: usize, style: Style) {
    let word = format!("{:<width$}", finding.severity.as_str(), width = CODE_AT - 3);
    let colour = match finding.severity {
        Severity::Error => "1;31",
        Severity::Warning => "33",
        Severity::Note => "36",
        Severity::Ok => "32",
    };
    let _ = write!(
        text,
        "  {} {:<code_width$}  ",
        paint(&word, colour, style),
        finding.code
    );
    let body = match &finding.object {
        Some(object) => format!("{object}: {}", finding.message),
        None => finding.message.clone(),
    };
    let mut lines = wrap(&body, style.width.saturating_sub(body_at)).into_iter();
    text.push_str(&lines.next().unwrap_or_default());
    text.push('\n');
    for rest in lines {
        let _ = writeln!(text, "{:body_at$}{rest}", "");
    }
}

fn wrapped(text: &mut String, lead: &str, body: &str, at: usize, width: usize) {
    let inner = at + lead.len();
    for (index, part) in wrap(body, width.saturating_sub(inner)).iter().enumerate() {
        let lead = if index == 0 { lead } else { "" };
        let _ = writeln!(text, "{:at$}{lead:<indent$}{part}", "", indent = inner - at);
    }
}

fn shares_hint(one: &Finding, next: &Finding) -> bool {
    (one.side, &one.database, &one.hint) == (next.side, &next.database, &next.hint)
}

fn summary(report: &CheckReport, style: Style) -> String {
    let counts = format!(
        "{}, {}, {}, {} ok",
        counted(report.errors, "error"),
        counted(report.warnings, "warning"),
        counted(report.count(Severity::Note), "note"),
        report.count(Severity::Ok)
    );
    let colour = if report.errors > 0 {
        "1;31"
    } else if report.warnings > 0 {
        "1;33"
    } else {
        "1;32"
    };
    paint(&counts, colour, style)
}

/// Breaks at spaces; a word longer than the line stays whole, so that it can be copied.
fn wrap(text: &str, width: usize) -> Vec<String> {
    // Narrower than this, wrapping makes it worse.
    let width = width.max(30);
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a last line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

fn paint(text: &str, colour: &str, style: Style) -> String {
    if style.colour {
        format!("\u{1b}[{colour}m{text}\u{1b}[0m")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{FindingPlace, FindingSide};
    use super::*;

    fn example() -> CheckReport {
        let source = FindingPlace::server(FindingSide::Source);
        let app = FindingPlace::database(FindingSide::Source, "app");
        CheckReport::new(vec![
            source
                .error("wal_level", "is \"replica\"")
                .hint("ALTER SYSTEM SET wal_level = logical; then restart the server"),
            source.ok("server_version", "PostgreSQL 15.8"),
            app.error("keyless_table", "has no key")
                .on("a.x")
                .hint("add a key"),
            app.error("keyless_table", "has no key")
                .on("a.y")
                .hint("add a key"),
        ])
    }

    #[test]
    fn a_report_reads_like_this() {
        let expected = "\
source
  ERROR    wal_level       is \"replica\"
                           -> ALTER SYSTEM SET wal_level = logical; then restart the server
  ok       server_version  PostgreSQL 15.8

source, database app
  ERROR    keyless_table   a.x: has no key
  ERROR    keyless_table   a.y: has no key
                           -> add a key

3 errors, 0 warnings, 0 notes, 1 ok
";
        assert_eq!(render(&example(), Style::PLAIN), expected);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let style = Style {
            width: 70,
            colour: false,
        };
        for line in render(&example(), style).lines() {
            assert!(line.chars().count() <= 70, "{line}");
        }
    }

    #[test]
    fn colours_add_nothing_but_colours() {
        let style = Style {
            width: Style::PLAIN.width,
            colour: true,
        };
        let coloured = render(&example(), style);
        assert!(coloured.contains('\u{1b}'));
        let mut plain = coloured;
        for code in ["1;31", "1;33", "1;32", "33", "36", "32", "1", "0"] {
            plain = plain.replace(&format!("\u{1b}[{code}m"), "");
        }
        assert_eq!(plain, render(&example(), Style::PLAIN));
    }
}
