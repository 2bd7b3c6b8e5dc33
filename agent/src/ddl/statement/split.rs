//! ● A client's string, cut into statements, and the words of one.
//!
//! The lexer is the one of squawk, which knows PostgreSQL's strings, dollar quotes, comments and identifiers, and has neither
//! dependencies nor unsafe code. A parser is not needed: a semicolon ends a statement where no bracket is open and no BEGIN ATOMIC
//! is (as in psql).

use squawk_lexer::{Token, TokenKind, tokenize};

/// One word or sign, where it is, and how many brackets are open there.
#[derive(Clone, Copy, Debug)]
struct Word<'t> {
    text: &'t str,
    kind: TokenKind,
    depth: usize,
}

/// What a text consists of, without spaces and comments.
fn words(text: &str) -> Vec<(usize, Word<'_>)> {
    let (mut at, mut depth) = (0, 0_usize);
    let mut words = Vec::new();
    for Token { kind, len } in tokenize(text) {
        let begin = at;
        at += len as usize;
        match kind {
            TokenKind::Whitespace | TokenKind::LineComment | TokenKind::BlockComment { .. } => {
                continue;
            }
            TokenKind::CloseParen | TokenKind::CloseBracket => depth = depth.saturating_sub(1),
            _ => {}
        }
        let text = text.get(begin..at).unwrap_or_default();
        words.push((begin, Word { text, kind, depth }));
        if matches!(kind, TokenKind::OpenParen | TokenKind::OpenBracket) {
            depth += 1;
        }
    }
    words
}

/// The statements of a string, without the semicolons between them; empty ones are none.
pub(super) fn split(text: &str) -> Vec<&str> {
    let mut statements = Vec::new();
    let (mut begin, mut end, mut blocks) = (None, 0, 0_usize);
    let mut creates = false;
    let mut previous = "";
    for (at, word) in words(text) {
        let is = |keyword: &str| {
            word.kind == TokenKind::Ident && word.text.eq_ignore_ascii_case(keyword)
        };
        if begin.is_none() {
            creates = is("CREATE");
        }
        // The body of an SQL function; CASE ends with END, too.
        if creates && word.depth == 0 {
            let opens = is("ATOMIC") && previous.eq_ignore_ascii_case("BEGIN");
            blocks += usize::from(opens || blocks > 0 && is("CASE"));
            blocks -= usize::from(blocks > 0 && is("END"));
        }
        if word.kind == TokenKind::Semi && word.depth == 0 && blocks == 0 {
            statements.extend(begin.take().and_then(|begin| text.get(begin..end)));
            previous = "";
            continue;
        }
        begin.get_or_insert(at);
        end = at + word.text.len();
        previous = word.text;
    }
    statements.extend(begin.and_then(|begin| text.get(begin..end)));
    statements
}

/// The words of one statement.
pub(super) struct Words<'t>(Vec<Word<'t>>);

impl<'t> Words<'t> {
    pub(super) fn of(statement: &'t str) -> Self {
        Self(words(statement).into_iter().map(|(_, word)| word).collect())
    }

    /// The first so many words, as they are.
    pub(super) fn leading(&self, count: usize) -> impl Iterator<Item = &'t str> {
        self.0.iter().take(count).map(|word| word.text)
    }

    /// Whether the statement begins with one of these keywords.
    pub(super) fn first_is(&self, keywords: &[&str]) -> bool {
        let first = self.0.first();
        first.is_some_and(|first| {
            keywords
                .iter()
                .any(|keyword| first.text.eq_ignore_ascii_case(keyword))
        })
    }

    /// Whether a keyword stands outside of brackets.
    pub(super) fn has(&self, keyword: &str) -> bool {
        self.0
            .iter()
            .any(|word| word.depth == 0 && word.is(keyword))
    }

    /// Whether a keyword stands outside of brackets, and one of the others, or a bracket, right behind it.
    pub(super) fn outside_has_pair(&self, keyword: &str, others: &[&str]) -> bool {
        self.0.windows(2).any(|pair| {
            let [a, b] = pair else {
                return false;
            };
            let follows = b.kind == TokenKind::OpenParen || others.iter().any(|other| b.is(other));
            a.depth == 0 && a.is(keyword) && follows
        })
    }

    /// Whether an ALTER TABLE adds a column whose values in rows that are there are computed: by a default that is no constant, by a
    /// sequence.
    pub(super) fn adds_computed_column(&self) -> bool {
        let actions = self
            .0
            .split(|word| word.depth == 0 && word.kind == TokenKind::Comma);
        actions.into_iter().any(adds_computed)
    }
}

impl Word<'_> {
    fn is(&self, keyword: &str) -> bool {
        self.kind == TokenKind::Ident && self.text.eq_ignore_ascii_case(keyword)
    }
}

/// One action of an ALTER TABLE, the first one with what stands before it.
fn adds_computed(action: &[Word<'_>]) -> bool {
    const OF_CONSTRAINTS: [&str; 6] = [
        "CONSTRAINT",
        "PRIMARY",
        "UNIQUE",
        "FOREIGN",
        "CHECK",
        "EXCLUDE",
    ];
    const SERIAL: [&str; 6] = [
        "SERIAL",
        "BIGSERIAL",
        "SMALLSERIAL",
        "SERIAL2",
        "SERIAL4",
        "SERIAL8",
    ];
    let Some(add) = action
        .iter()
        .position(|word| word.depth == 0 && word.is("ADD"))
    else {
        return false;
    };
    let column = &action[add + 1..];
    let is_constraint = column
        .first()
        .is_some_and(|first| OF_CONSTRAINTS.iter().any(|word| first.is(word)));
    // ALTER COLUMN … ADD GENERATED … AS IDENTITY.
    let is_of_a_column = action[..add]
        .iter()
        .any(|word| word.depth == 0 && (word.is("ALTER")))
        && action[..add].iter().filter(|word| word.is("ALTER")).count() > 1;
    if is_constraint || is_of_a_column {
        return false;
    }
    let is_serial = column
        .iter()
        .any(|word| SERIAL.iter().any(|serial| word.is(serial)));
    let is_identity = column
        .iter()
        .any(|word| word.depth == 0 && word.is("IDENTITY"));
    let default = column
        .iter()
        .position(|word| word.depth == 0 && word.is("DEFAULT"));
    let computed = default.is_some_and(|at| !is_constant(&column[at + 1..]));
    is_serial || is_identity || computed
}

/// Whether a default is a constant, as far as that can be seen: a literal, with a sign before it and a cast behind it.
fn is_constant(default: &[Word<'_>]) -> bool {
    const CONSTANTS: [&str; 3] = ["TRUE", "FALSE", "NULL"];
    let mut rest = default
        .iter()
        .skip_while(|word| matches!(word.kind, TokenKind::Minus | TokenKind::Plus));
    let Some(first) = rest.next() else {
        return false;
    };
    let is_array = first.is("ARRAY");
    let is_literal = matches!(first.kind, TokenKind::Literal { .. })
        || CONSTANTS.iter().any(|constant| first.is(constant));
    // now() behind a literal would be another one: 'x' || now().
    let calls = default
        .windows(2)
        .take_while(|pair| !pair.iter().any(ends_default))
        .any(|pair| {
            let [name, bracket] = pair else {
                return false;
            };
            name.kind == TokenKind::Ident && bracket.kind == TokenKind::OpenParen && !is_type(name)
        });
    let operates = default
        .iter()
        .take_while(|word| !ends_default(word))
        .any(|word| {
            word.depth == first.depth
                && matches!(
                    word.kind,
                    TokenKind::Or | TokenKind::Star | TokenKind::Slash
                )
        });
    (is_literal || is_array) && !calls && !operates
}

/// Types that are written with brackets behind a cast.
fn is_type(word: &Word<'_>) -> bool {
    const TYPES: [&str; 9] = [
        "VARCHAR",
        "CHAR",
        "CHARACTER",
        "VARYING",
        "NUMERIC",
        "DECIMAL",
        "BIT",
        "TIMESTAMP",
        "TIME",
    ];
    TYPES.iter().any(|name| word.is(name))
}

/// Whether the default ends here: a constraint of the column begins.
fn ends_default(word: &Word<'_>) -> bool {
    const NEXT: [&str; 8] = [
        "NOT",
        "CONSTRAINT",
        "CHECK",
        "PRIMARY",
        "UNIQUE",
        "REFERENCES",
        "GENERATED",
        "COLLATE",
    ];
    NEXT.iter().any(|next| word.is(next))
}
