//! The two forms of a connection string, URL and `key=value`, taken apart into a list of settings.
//!
//! PostgreSQL documentation, "Connection Strings".
//!
//! # Invariants
//! - No error quotes what may be a password or a part of one.
//!
//! # What it does not do
//! It knows no setting by its meaning: that is [`super::parse`].

use super::ConnInfoError;

/// Names and values in the order of the text.
pub(super) type Settings = Vec<(String, String)>;

/// `[user[:password]@][host[:port][,…]][/dbname][?name=value[&…]]`.
pub(super) fn url(rest: &str) -> Result<Settings, ConnInfoError> {
    let mut settings = Settings::new();
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, dbname) = match rest.split_once('/') {
        Some((authority, dbname)) => (authority, Some(dbname)),
        None => (rest, None),
    };
    let (userinfo, hosts) = match authority.rsplit_once('@') {
        Some((userinfo, hosts)) => (Some(userinfo), hosts),
        None => (None, authority),
    };
    if let Some(userinfo) = userinfo {
        let (user, password) = match userinfo.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (userinfo, None),
        };
        if !user.is_empty() {
            settings.push(("user".to_owned(), percent_decode("user", user)?));
        }
        if let Some(password) = password {
            let password = percent_decode("password", password)?;
            settings.push(("password".to_owned(), password));
        }
    }
    if !hosts.is_empty() {
        let mut names = Vec::new();
        let mut ports = Vec::new();
        for host in hosts.split(',') {
            let (name, port) = split_port(host)?;
            names.push(percent_decode("host", name)?);
            ports.push(port.to_owned());
        }
        settings.push(("host".to_owned(), names.join(",")));
        settings.push(("port".to_owned(), ports.join(",")));
    }
    if let Some(dbname) = dbname.filter(|name| !name.is_empty()) {
        settings.push(("dbname".to_owned(), percent_decode("dbname", dbname)?));
    }
    for pair in query
        .unwrap_or_default()
        .split('&')
        .filter(|p| !p.is_empty())
    {
        let Some((name, value)) = pair.split_once('=') else {
            return Err(ConnInfoError(format!(
                "parameter `{pair}` has no value (a `?` or `/` in a password is written %3F, %2F)"
            )));
        };
        let name = percent_decode("a parameter's name", name)?;
        let value = percent_decode(&name, value)?;
        settings.push((name, value));
    }
    Ok(settings)
}

/// Takes `:port` off a host; an IPv6 address stands in brackets.
fn split_port(host: &str) -> Result<(&str, &str), ConnInfoError> {
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return Err(ConnInfoError(format!(
                "`{host}`: the bracket is not closed"
            )));
        };
        return match port.strip_prefix(':') {
            Some(port) => Ok((address, port)),
            None if port.is_empty() => Ok((address, "")),
            None => Err(ConnInfoError(format!(
                "`{host}`: only `:port` may follow the bracket"
            ))),
        };
    }
    Ok(host.split_once(':').unwrap_or((host, "")))
}

fn percent_decode(what: &str, text: &str) -> Result<String, ConnInfoError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let digits = tail.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) if byte != 0 => bytes.push(byte),
            _ => {
                return Err(ConnInfoError(format!(
                    "{what}: a `%` must be followed by two hexadecimal digits, not 00 \
                     (a percent sign itself is written %25)"
                )));
            }
        }
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| ConnInfoError(format!("{what}: not UTF-8")))
}

/// `name = value name = 'quoted \' value'`.
pub(super) fn keywords(text: &str) -> Result<Settings, ConnInfoError> {
    let mut settings = Settings::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(settings);
        }
        let mut name = String::new();
        while let Some(c) = chars.next_if(|c| !c.is_whitespace() && *c != '=') {
            name.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next() != Some('=') {
            // What stands here may be the rest of a password with a space in it: not quoted.
            return Err(ConnInfoError(
                "a setting lacks its `=` (a value with spaces is written in single quotes)"
                    .to_owned(),
            ));
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.peek().copied() {
                None if quoted => {
                    return Err(ConnInfoError(format!("{name}: the quote is not closed")));
                }
                None => break,
                Some('\'') if quoted => {
                    chars.next();
                    break;
                }
                Some(c) if !quoted && c.is_whitespace() => break,
                Some('\\') => {
                    chars.next();
                    value.extend(chars.next());
                }
                Some(c) => {
                    chars.next();
                    value.push(c);
                }
            }
        }
        settings.push((name, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_value_survives_quoting(value in "\\PC*") {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let settings = keywords(&format!("a = '{quoted}' b=c")).unwrap();
            prop_assert_eq!(settings, [("a".to_owned(), value), ("b".to_owned(), "c".to_owned())]);
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "[a%\\[\\]:@/?&=,'\\\\ é]{0,30}") {
            let _ = url(&text);
            let _ = keywords(&text);
        }
    }
}
