//! Goal: values of every built-in type, as their input text: the edges of each type and random ones.
//! Method: proptest strategies; [`arrays_of`] makes arrays of any of them, with NULLs and odd bounds.

use proptest::prelude::*;

/// One type to carry over.
pub(crate) struct Kind {
    /// A name for tables.
    pub(crate) name: &'static str,
    /// Its name in SQL.
    pub(crate) sql: &'static str,
    /// Values every run must carry.
    pub(crate) edges: &'static [&'static str],
    /// Any value.
    pub(crate) any: BoxedStrategy<String>,
    /// What separates the elements of an array: only `box` differs.
    pub(crate) delimiter: char,
}

/// What the tables of [`kinds`] need first.
pub(crate) const TYPES: &str = r#"
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE DOMAIN label AS text CHECK (length(VALUE) < 1000);
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'it''s "complicated"', 'größer', 'happy');
    CREATE TYPE pair AS (a int, "B b" text, c numeric[]);
    CREATE TYPE nested AS (one pair, many pair[], mood mood, "when" timestamptz);
    CREATE DOMAIN moods AS mood[] CHECK (cardinality(VALUE) < 10);
    CREATE TYPE floatrange AS RANGE (subtype = float8, subtype_diff = float8mi);
    CREATE TYPE "Schräg ""Typ""" AS ENUM ('a', 'B');
"#;

/// Every type of the core, and those made by [`TYPES`].
pub(crate) fn kinds() -> Vec<Kind> {
    let mut kinds = numbers();
    kinds.extend(texts());
    kinds.extend(times());
    kinds.extend(documents());
    kinds.extend(networks_and_bits());
    kinds.extend(shapes());
    kinds.extend(ranges());
    kinds.extend(made_by_users());
    kinds
}

/// Types of the contributed extensions.
pub(crate) fn extension_kinds() -> Vec<(&'static str, Kind)> {
    vec![
        (
            "citext",
            kind("citext", "citext", &["", "ÄÖü", "Case"], text()),
        ),
        (
            "hstore",
            kind(
                "hstore",
                "hstore",
                &["", "a=>b, c=>NULL", r#""k \"q"=>"v\"\\""#],
                (0..99).prop_map(|n| format!("k{n}=>v, other=>\"{n} 'x'\"")),
            ),
        ),
    ]
}

fn kind(
    name: &'static str,
    sql: &'static str,
    edges: &'static [&'static str],
    any: impl Strategy<Value = String> + 'static,
) -> Kind {
    Kind {
        name,
        sql,
        edges,
        any: any.boxed(),
        delimiter: ',',
    }
}

fn one_of(edges: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::sample::select(edges).prop_map(str::to_owned)
}

fn shown<T: std::fmt::Display + std::fmt::Debug>(
    any: impl Strategy<Value = T>,
) -> impl Strategy<Value = String> {
    any.prop_map(|value| value.to_string())
}

/// Any text PostgreSQL can store: everything but the NUL character.
fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(any::<char>().prop_filter("NUL", |c| *c != '\0'), 0..40)
        .prop_map(String::from_iter)
}

fn float() -> impl Strategy<Value = f64> {
    use prop::num::f64::{NEGATIVE, NORMAL, POSITIVE, ZERO};
    NORMAL | ZERO | POSITIVE | NEGATIVE
}

fn numbers() -> Vec<Kind> {
    const FLOATS: &[&str] = &["NaN", "Infinity", "-Infinity", "-0", "0.1", "1e-30"];
    let digits = (any::<i128>(), 0..30_usize).prop_map(|(digits, scale)| {
        let text = format!("{:040}", digits.unsigned_abs());
        let sign = if digits < 0 { "-" } else { "" };
        format!(
            "{sign}{}.{}",
            &text[..text.len() - scale],
            &text[text.len() - scale..]
        )
    });
    vec![
        kind("bool", "boolean", &["t", "f"], shown(any::<bool>())),
        kind(
            "int2",
            "smallint",
            &["-32768", "32767"],
            shown(any::<i16>()),
        ),
        kind(
            "int4",
            "integer",
            &["-2147483648", "2147483647"],
            shown(any::<i32>()),
        ),
        kind(
            "int8",
            "bigint",
            &["-9223372036854775808"],
            shown(any::<i64>()),
        ),
        kind(
            "numeric",
            "numeric",
            &[
                "NaN",
                "Infinity",
                "-Infinity",
                "0",
                "-0.000",
                "1.10",
                "1e-500",
                "9e1000",
                "10000",
            ],
            digits,
        ),
        kind(
            "numeric_9_2",
            "numeric(9,2)",
            &["NaN", "0.00", "-9999999.99"],
            (-999_999_999..999_999_999_i64)
                .prop_map(|n| format!("{}.{:02}", n / 100, n.abs() % 100)),
        ),
        kind(
            "float4",
            "real",
            FLOATS,
            prop::num::f32::NORMAL.prop_map(|value| format!("{value:e}")),
        ),
        kind(
            "float8",
            "double precision",
            FLOATS,
            float().prop_map(|value| format!("{value:e}")),
        ),
        kind(
            "money",
            "money",
            &["-92233720368547758.08", "0", "0.01"],
            (-1_000_000_000..1_000_000_000_i64)
                .prop_map(|n| format!("{}.{:02}", n / 100, n.abs() % 100)),
        ),
        kind("oid", "oid", &["0", "4294967295"], shown(any::<u32>())),
        kind(
            "xid8",
            "xid8",
            &["0", "18446744073709551615"],
            shown(any::<u64>()),
        ),
        kind(
            "tid",
            "tid",
            &["(0,1)", "(4294967295,65535)"],
            (any::<u32>(), any::<u16>()).prop_map(|(a, b)| format!("({a},{b})")),
        ),
        kind(
            "pg_lsn",
            "pg_lsn",
            &["0/0", "FFFFFFFF/FFFFFFFF"],
            (any::<u32>(), any::<u32>()).prop_map(|(a, b)| format!("{a:X}/{b:X}")),
        ),
        kind(
            "pg_snapshot",
            "pg_snapshot",
            &["10:20:10,14,15", "1:1:"],
            (1..9_u64).prop_map(|n| format!("{n}:{0}:{n}", n + 3)),
        ),
    ]
}

fn texts() -> Vec<Kind> {
    const TEXTS: &[&str] = &[
        "",
        " ",
        "NULL",
        "\\N",
        "\\",
        "'",
        "\"",
        "a\tb\r\nc",
        "ÄÖ\u{1F600}",
        "{}",
        "(,)",
        "\u{1}\u{7f}",
    ];
    let ascii = prop::char::range('!', '~').prop_map(String::from);
    let word =
        prop::collection::vec(prop::char::range('a', 'z'), 0..20).prop_map(String::from_iter);
    let bytes = prop::collection::vec(any::<u8>(), 0..60).prop_map(|bytes| {
        bytes
            .iter()
            .fold("\\x".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    });
    vec![
        kind("text", "text", TEXTS, text()),
        kind("varchar", "varchar(40)", TEXTS, text()),
        kind(
            "bpchar",
            "char(12)",
            &["", "  x ", "ü"],
            word.clone().prop_map(|w| w.chars().take(12).collect()),
        ),
        kind("name", "name", &["", "Größe"], word),
        kind("char", "\"char\"", &["", "a", "\\"], ascii),
        kind("bytea", "bytea", &["\\x", "\\x00ff5c27", "\\x5c78"], bytes),
        kind(
            "uuid",
            "uuid",
            &[
                "00000000-0000-0000-0000-000000000000",
                "ffffffff-ffff-ffff-ffff-ffffffffffff",
            ],
            any::<u128>().prop_map(|n| format!("{n:032x}")),
        ),
    ]
}

fn times() -> Vec<Kind> {
    let era = |bc: bool| if bc { " BC" } else { "" };
    let date = (1..4713_i32, 1..=12_u8, 1..=28_u8, any::<bool>())
        .prop_map(|(year, month, day, bc)| (format!("{year:04}-{month:02}-{day:02}"), bc));
    let clock = (0..86_400_000_000_u64).prop_map(|micros| {
        let seconds = micros / 1_000_000;
        let (hour, minute) = (seconds / 3600, seconds / 60 % 60);
        format!(
            "{hour:02}:{minute:02}:{:02}.{:06}",
            seconds % 60,
            micros % 1_000_000
        )
    });
    let moment = (date.clone(), clock.clone())
        .prop_map(move |((day, bc), time)| format!("{day} {time}{}", era(bc)));
    let zoned = (date.clone(), clock.clone(), -11..12_i32)
        .prop_map(move |((day, bc), time, zone)| format!("{day} {time}{zone:+03}{}", era(bc)));
    let interval = (
        any::<i16>(),
        any::<i16>(),
        -9_000_000_000_000_i64..9_000_000_000_000,
    )
        .prop_map(|(months, days, micros)| {
            // Before 15 a field of microseconds takes no more than 32 bits.
            let sign = if micros < 0 { "-" } else { "" };
            let (seconds, rest) = (micros.abs() / 1_000_000, micros.abs() % 1_000_000);
            format!("{months} mons {days} days {sign}{seconds}.{rest:06} seconds")
        });
    const STAMPS: &[&str] = &[
        "infinity",
        "-infinity",
        "4713-01-01 00:00:00 BC",
        "294276-12-31 23:59:59.999999",
        "0001-01-01 00:00:00 BC",
    ];
    vec![
        kind(
            "date",
            "date",
            &["infinity", "-infinity", "4713-01-01 BC", "5874897-12-31"],
            date.prop_map(move |(day, bc)| format!("{day}{}", era(bc))),
        ),
        kind(
            "time",
            "time",
            &["00:00:00", "24:00:00", "23:59:59.999999"],
            clock.clone(),
        ),
        kind(
            "timetz",
            "timetz",
            &["00:00:00+15:59", "24:00:00-15:59"],
            (clock, -11..12_i32).prop_map(|(time, zone)| format!("{time}{zone:+03}")),
        ),
        kind("timestamp", "timestamp", STAMPS, moment),
        kind("timestamptz", "timestamptz", STAMPS, zoned),
        kind(
            "interval",
            "interval",
            &[
                "0",
                "1 year -2 mons 3 days -04:05:06.789",
                "-178000000 years",
            ],
            interval,
        ),
    ]
}

fn documents() -> Vec<Kind> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        text().prop_map(Into::into),
    ];
    let json = leaf
        .prop_recursive(3, 20, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                prop::collection::vec((text(), inner), 0..5)
                    .prop_map(|pairs| serde_json::Value::Object(pairs.into_iter().collect())),
            ]
        })
        .prop_map(|value| value.to_string());
    const JSON: &[&str] = &[
        "null",
        "{}",
        "[]",
        "\"\\u00e4 \\\\ \\\"\"",
        "{\"b\": 1,  \"a\": 2, \"b\": 3}",
        "1e400",
        "-0.0",
    ];
    let words = prop::collection::vec(
        prop::char::range('a', 'k').prop_map(|c| format!("{c}:{}A", u32::from(c))),
        0..8,
    )
    .prop_map(|words| words.join(" "));
    vec![
        kind("json", "json", JSON, json.clone()),
        kind("jsonb", "jsonb", JSON, json),
        kind(
            "jsonpath",
            "jsonpath",
            &["$", "$.a[*] ? (@ > 1)"],
            (0..99).prop_map(|n| format!("$.key[{n}]")),
        ),
        kind(
            "xml",
            "xml",
            &["", "<a b=\"c\">&lt;ü</a>", "<!-- only --><a/>"],
            (0..99).prop_map(|n| format!("<row n=\"{n}\"><x>ä</x></row>")),
        ),
        kind(
            "tsvector",
            "tsvector",
            &["", "'fat':2A,4C 'it''s':9"],
            words,
        ),
        kind(
            "tsquery",
            "tsquery",
            &["", "'fat' & ('rat':A | !'cat') <-> 'x':*"],
            one_of(&["a", "a | b", "!a <2> b"]),
        ),
    ]
}

fn networks_and_bits() -> Vec<Kind> {
    let v4 = (any::<u32>(), 0..=32_u8)
        .prop_map(|(ip, bits)| format!("{}/{bits}", std::net::Ipv4Addr::from(ip)));
    let v6 = (any::<u128>(), 0..=128_u8)
        .prop_map(|(ip, bits)| format!("{}/{bits}", std::net::Ipv6Addr::from(ip)));
    let net = any::<u16>().prop_map(|n| format!("10.{}.{}.0/24", n >> 8, n & 255));
    let mac = any::<u64>().prop_map(|n| format!("{:012x}", n >> 16));
    let bit = prop::char::range('0', '1');
    vec![
        kind(
            "inet",
            "inet",
            &["0.0.0.0/0", "::1", "192.168.1.5/24", "fe80::1/64"],
            prop_oneof![v4, v6],
        ),
        kind("cidr", "cidr", &["0.0.0.0/0", "2001:db8::/32"], net),
        kind("macaddr", "macaddr", &["ff:ff:ff:ff:ff:ff"], mac),
        kind(
            "macaddr8",
            "macaddr8",
            &["00:00:00:00:00:00:00:01"],
            any::<u64>().prop_map(|n| format!("{n:016x}")),
        ),
        kind(
            "bit",
            "bit(9)",
            &["000000000", "111111111"],
            prop::collection::vec(bit.clone(), 9).prop_map(String::from_iter),
        ),
        kind(
            "varbit",
            "varbit",
            &["", "1"],
            prop::collection::vec(bit, 0..70).prop_map(String::from_iter),
        ),
    ]
}

fn shapes() -> Vec<Kind> {
    let n = || (-1000..1000_i32).prop_map(|n| f64::from(n) / 8.0);
    let p = move || (n(), n()).prop_map(|(x, y)| format!("({x},{y})"));
    let two = move || (p(), p());
    let mut boxes = kind(
        "box",
        "box",
        &["(1,2),(-3,NaN)"],
        two().prop_map(|(a, b)| format!("{a},{b}")),
    );
    boxes.delimiter = ';';
    vec![
        kind("point", "point", &["(Infinity,-0)", "(1e-300,1e300)"], p()),
        kind(
            "line",
            "line",
            &["{1,0,0}"],
            (n(), n()).prop_map(|(b, c)| format!("{{1,{b},{c}}}")),
        ),
        kind(
            "lseg",
            "lseg",
            &["[(0,0),(0,0)]"],
            two().prop_map(|(a, b)| format!("[{a},{b}]")),
        ),
        boxes,
        kind(
            "path",
            "path",
            &["[(0,0)]", "((1,1),(2,2))"],
            two().prop_map(|(a, b)| format!("[{a},{b},{a}]")),
        ),
        kind(
            "polygon",
            "polygon",
            &["((0,0))"],
            two().prop_map(|(a, b)| format!("({a},{b},(7,7))")),
        ),
        kind(
            "circle",
            "circle",
            &["<(0,0),0>"],
            p().prop_map(|centre| format!("<{centre},2.5>")),
        ),
    ]
}

fn ranges() -> Vec<Kind> {
    let span = || {
        (-1000..1000_i32, 0..1000_i32).prop_map(|(low, length)| format!("[{low},{})", low + length))
    };
    let spans =
        || (0..100, 0..100).prop_map(|(a, b)| format!("{{[{a},{}),({},)}}", a + b, a + b + 9));
    let days = || (1..28, 1..28).prop_map(|(a, b)| format!("[2024-01-{a:02},2024-02-{b:02}]"));
    const RANGES: &[&str] = &["empty", "(,)", "[1,1]", "(,5]", "[7,)"];
    const MULTI: &[&str] = &["{}", "{(,)}", "{[1,3),[5,9),[20,)}"];
    const STAMPED: &[&str] = &["empty", "[infinity,]", "(,\"0044-03-15 12:00:00 BC\"]"];
    vec![
        kind("int4range", "int4range", RANGES, span()),
        kind("int8range", "int8range", RANGES, span()),
        kind(
            "numrange",
            "numrange",
            &["empty", "(1.50,2.0]", "[NaN,NaN]"],
            span(),
        ),
        kind("tsrange", "tsrange", STAMPED, days()),
        kind("tstzrange", "tstzrange", STAMPED, days()),
        kind(
            "daterange",
            "daterange",
            &["empty", "[-infinity,infinity]"],
            days(),
        ),
        kind("int4multirange", "int4multirange", MULTI, spans()),
        kind("nummultirange", "nummultirange", MULTI, spans()),
        kind(
            "tstzmultirange",
            "tstzmultirange",
            &["{}", "{(,infinity]}"],
            days().prop_map(|day| format!("{{{day}}}")),
        ),
        kind(
            "datemultirange",
            "datemultirange",
            &["{}"],
            days().prop_map(|day| format!("{{{day}}}")),
        ),
        kind(
            "floatrange",
            "floatrange",
            &["empty", "[0.1,Infinity)"],
            span(),
        ),
        kind("floatmultirange", "floatmultirange", MULTI, spans()),
    ]
}

fn made_by_users() -> Vec<Kind> {
    const PAIRS: &[&str] = &[
        "(,,)",
        "(1,\"a\"\"b,(\\\\\",\"{1.50,NaN,NULL}\")",
        "(,\"\",{})",
    ];
    const NESTED: &[&str] = &[
        "(,,,)",
        "(\"(1,x,{1})\",\"{\"\"(2,\\\\\"\"y z\\\\\"\",)\"\",NULL}\",ok,infinity)",
    ];
    vec![
        kind("positive", "positive", &["1"], shown(1..i32::MAX)),
        kind("label", "label", &["", "ü"], text()),
        kind(
            "mood",
            "mood",
            &["it's \"complicated\"", "größer"],
            one_of(&["sad", "ok", "happy"]),
        ),
        kind(
            "odd_name",
            "\"Schräg \"\"Typ\"\"\"",
            &["a", "B"],
            one_of(&["a", "B"]),
        ),
        kind(
            "pair",
            "pair",
            PAIRS,
            any::<i32>().prop_map(|n| format!("({n},\"n {n}\",{{{n}.5}})")),
        ),
        kind(
            "nested",
            "nested",
            NESTED,
            any::<i16>().prop_map(|n| format!("(\"({n},,)\",{{}},sad,)")),
        ),
        kind(
            "moods",
            "moods",
            &["{}", "{sad,NULL,größer}"],
            one_of(&["{ok}", "{ok,ok}"]),
        ),
    ]
}

/// A value of the kind, its edges as often as any other.
pub(crate) fn value_of(kind: &Kind) -> BoxedStrategy<Option<String>> {
    prop_oneof![
        1 => Just(None),
        3 => one_of(kind.edges).prop_map(Some),
        6 => kind.any.clone().prop_map(Some),
    ]
    .boxed()
}

/// The input text of an array: none, one or two dimensions, NULLs, lower bounds other than 1.
pub(crate) fn arrays_of(kind: &Kind) -> BoxedStrategy<Option<String>> {
    let delimiter = kind.delimiter;
    (
        prop::collection::vec(value_of(kind), 0..7),
        -3..4_i32,
        any::<bool>(),
    )
        .prop_map(move |(values, low, square)| {
            let elements: Vec<String> = values.iter().map(element).collect();
            let join =
                |elements: &[String]| format!("{{{}}}", elements.join(&delimiter.to_string()));
            Some(match elements.len() {
                0 => "{}".to_owned(),
                even if square && even % 2 == 0 => {
                    let (first, second) = elements.split_at(even / 2);
                    let rows = [join(first), join(second)];
                    format!("[{low}:{}][0:{}]={}", low + 1, even / 2 - 1, join(&rows))
                }
                count => {
                    let high = low + i32::try_from(count).unwrap() - 1;
                    format!("[{low}:{high}]={}", join(&elements))
                }
            })
        })
        .boxed()
}

/// The input text of a plain array of one value and a NULL.
pub(crate) fn array_with_null(kind: &Kind, value: &str) -> String {
    let value = element(&Some(value.to_owned()));
    format!("{{{value}{}NULL}}", kind.delimiter)
}

fn element(value: &Option<String>) -> String {
    match value {
        None => "NULL".to_owned(),
        Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
    }
}
