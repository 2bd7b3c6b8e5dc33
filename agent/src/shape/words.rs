//! ● Whether two texts that a server has written of a definition say the same in other words.
//!
//! PostgreSQL writes what it has parsed, and what is loaded from a dump is parsed from what was written: afterwards a cast stands
//! elsewhere. `status IN ('a', 'b')` of a varchar is `((ARRAY['a'::character varying, 'b'::character varying])::text[])` where it
//! was created and `(ARRAY[('a'::character varying)::text, ('b'::character varying)::text])` where it was loaded, and stays so.
//!
//! # Invariants
//! - Casts may stand elsewhere, each type as often as it likes, but of the same types; parentheses around a single thing do not count.
//! - Everything else is compared as it is: `(a + b) * c` is not `a + b * c`.

use std::collections::BTreeSet;

/// A piece of a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token<'t> {
    /// A name, a number, a literal, a word of the language.
    Word(&'t str),
    /// Any other character, or an operator.
    Sign(&'t str),
}

/// Whether they say the same.
pub(super) fn are_the_same(a: &str, b: &str) -> bool {
    a == b || normal(a) == normal(b)
}

/// What is left without casts and needless parentheses, and the types that are cast to.
fn normal(text: &str) -> (Vec<Token<'_>>, BTreeSet<String>) {
    let (tokens, types) = without_casts(&tokens(text));
    (without_needless_parentheses(tokens), types)
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '\'' | '"' => quoted(rest, first),
            _ if is_of_word(first) => rest.find(|c| !is_of_word(c)).unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            _ => first.len_utf8(),
        };
        let (token, behind) = rest.split_at(length);
        tokens.push(match is_of_word(first) || matches!(first, '\'' | '"') {
            true => Token::Word(token),
            false => Token::Sign(token),
        });
        rest = behind.trim_start();
    }
    tokens
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '$' | '.')
}

/// How long a quoted piece is; a doubled quote is none.
fn quoted(text: &str, quote: char) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = characters.next() {
        if c == quote && characters.next_if(|(_, next)| *next == quote).is_none() {
            return at + 1;
        }
    }
    text.len()
}

/// Without `::type`; the server writes types in small letters and what follows them in capitals.
fn without_casts<'t>(tokens: &[Token<'t>]) -> (Vec<Token<'t>>, BTreeSet<String>) {
    let (mut left, mut types) = (Vec::new(), BTreeSet::new());
    let mut rest = tokens;
    while let [first, behind @ ..] = rest {
        rest = behind;
        if *first != Token::Sign("::") {
            left.push(first.clone());
            continue;
        }
        let mut name = String::new();
        loop {
            match rest {
                [Token::Word(word), behind @ ..] if is_of_type(word) => {
                    name.push_str(word);
                    name.push(' ');
                    rest = behind;
                }
                // numeric(10,2), timestamp(3) without time zone
                [Token::Sign("("), behind @ ..]
                    if !name.is_empty() && modifier(behind).is_some() =>
                {
                    let length = modifier(behind).unwrap_or_default();
                    for token in &behind[..length] {
                        if let Token::Word(number) = token {
                            name.push_str(number);
                            name.push(' ');
                        }
                    }
                    rest = &behind[length + 1..];
                }
                [Token::Sign("["), Token::Sign("]"), behind @ ..] => rest = behind,
                [Token::Sign("."), behind @ ..] if !name.is_empty() => rest = behind,
                _ => break,
            }
        }
        types.insert(name);
    }
    (left, types)
}

fn is_of_type(word: &str) -> bool {
    word.starts_with('"') || !word.starts_with('\'') && !word.chars().any(char::is_uppercase)
}

/// How many tokens stand before the closing parenthesis, if these are numbers.
fn modifier(tokens: &[Token<'_>]) -> Option<usize> {
    let length = tokens.iter().position(|token| *token == Token::Sign(")"))?;
    let are_numbers = tokens[..length].iter().all(|token| match token {
        Token::Word(word) => word.bytes().all(|byte| byte.is_ascii_digit()),
        Token::Sign(sign) => *sign == ",",
    });
    (length > 0 && are_numbers).then_some(length)
}

/// Without parentheses around one word, one `ARRAY[…]`, or other parentheses; but for those of a call.
fn without_needless_parentheses(mut tokens: Vec<Token<'_>>) -> Vec<Token<'_>> {
    loop {
        let pairs = pairs(&tokens);
        let needless = pairs.iter().find(|&&(open, close)| {
            let is_of_call = open > 0 && matches!(tokens[open - 1], Token::Word(_));
            !is_of_call && is_single(&tokens[open + 1..close], &pairs, open + 1)
        });
        let Some(&(open, close)) = needless else {
            return tokens;
        };
        tokens.remove(close);
        tokens.remove(open);
    }
}

/// Where parentheses and brackets open and close.
fn pairs(tokens: &[Token<'_>]) -> Vec<(usize, usize)> {
    let (mut open, mut pairs) = (Vec::new(), Vec::new());
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Sign("(" | "[") => open.push(at),
            Token::Sign(")" | "]") => {
                if let Some(from) = open.pop() {
                    pairs.push((from, at));
                }
            }
            _ => {}
        }
    }
    pairs.retain(|&(from, _)| tokens[from] == Token::Sign("(") || from > 0);
    pairs
}

/// Whether what stands between parentheses is one thing; it begins at `at`.
fn is_single(inside: &[Token<'_>], pairs: &[(usize, usize)], at: usize) -> bool {
    let is_closed_at_end = |open: usize| pairs.contains(&(open, at + inside.len() - 1));
    match inside {
        [Token::Word(_)] => true,
        [Token::Sign("("), ..] => is_closed_at_end(at),
        [Token::Word("ARRAY"), Token::Sign("["), ..] => is_closed_at_end(at + 1),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_loaded_from_a_dump_says_the_same() {
        let same = [
            (
                "CHECK (((status)::text = ANY ((ARRAY['new'::character varying, 'it''s (paid)'::character varying])::text[])))",
                "CHECK (((status)::text = ANY (ARRAY[('new'::character varying)::text, ('it''s (paid)'::character varying)::text])))",
            ),
            (
                " SELECT a.id FROM a WHERE ((a.k)::text <> ALL ((ARRAY['x'::character varying(3), 'y'::character varying(3)])::text[]));",
                " SELECT a.id FROM a WHERE ((a.k)::text <> ALL (ARRAY[('x'::character varying(3))::text, ('y'::character varying(3))::text]));",
            ),
            ("(a = 1)", "( a=1 )"),
        ];
        for (a, b) in same {
            assert!(
                are_the_same(a, b),
                "{a}\n{b}\n{:?}\n{:?}",
                normal(a),
                normal(b)
            );
        }
    }

    #[test]
    fn what_means_something_else_is_not_the_same() {
        let others = [
            ("((a + b) * c)", "(a + (b * c))"),
            ("(a > 1)", "(a > 2)"),
            ("('a'::text)", "('A'::text)"),
            ("(a)::integer", "(a)::bigint"),
            ("(a)::numeric(10,2)", "(a)::numeric(10,3)"),
            ("lower(a)", "lower"),
            ("lower((a)::text)", "upper((a)::text)"),
            ("(\"A\" > 1)", "(a > 1)"),
            ("'a b'", "'ab'"),
            ("(a AND (b OR c))", "((a AND b) OR c)"),
            (
                "((a)::time without time zone)",
                "((a)::time with time zone)",
            ),
            ("", "(a)"),
        ];
        for (a, b) in others {
            assert!(!are_the_same(a, b), "{a}\n{b}");
        }
    }

    #[test]
    fn text_that_is_cut_short_ends() {
        for text in [
            "'a", "\"", "((", "))", "::", "a::", "a::b(", "a::b(1", "ARRAY[", "::[]::",
        ] {
            assert!(are_the_same(text, text));
            _ = normal(text);
        }
    }
}
