//! A small request, and the Prometheus text format: just enough to look at what the agent and stand-ins serve.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What a server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// 200, 404, 503 …
    pub status: u16,
    /// The header lines, as sent.
    pub headers: String,
    /// The body.
    pub body: String,
}

/// Asks for `path`; the error is text (nobody listens, no answer within five seconds).
pub async fn get(port: u16, path: &str) -> Result<Answer, String> {
    ask(port, "GET", path).await
}

/// The same with another method.
pub async fn ask(port: u16, method: &str, path: &str) -> Result<Answer, String> {
    send(port, method, path, &[], "").await
}

/// The same with headers and a body.
pub async fn send(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<Answer, String> {
    // Version 1.0: the answer ends with the connection and is not cut into chunks.
    let mut request = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        request += &format!("Content-Length: {}\r\n", body.len());
    }
    request += "\r\n";
    request += body;
    let asked = tokio::time::timeout(Duration::from_secs(5), exchange(port, &request)).await;
    let bytes = match asked {
        Ok(answer) => answer.map_err(|error| error.to_string())?,
        Err(_) => return Err(format!("no answer to {method} {path} within 5 s")),
    };
    let text = String::from_utf8_lossy(&bytes);
    let (headers, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| format!("not an HTTP answer: {text}"))?;
    let status = headers
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| format!("no status in: {headers}"))?;
    Ok(Answer {
        status,
        headers: headers.to_owned(),
        body: body.to_owned(),
    })
}

async fn exchange(port: u16, request: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// What `/metrics` said at one moment.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads the Prometheus text format; a line that is not understood fails the test.
    pub fn parse(text: &str) -> Self {
        let samples = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| {
                parse_sample(line).unwrap_or_else(|| panic!("not a Prometheus sample: {line}"))
            })
            .collect();
        Self { samples }
    }

    /// The value of the only sample of this name that has at least these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.matching(name, labels)
            .next()
            .map(|sample| sample.value)
    }

    /// The sum over all samples of this name that have at least these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }

    /// Whether there is a sample of this name; a histogram counts through its `_count`.
    pub fn has(&self, name: &str) -> bool {
        let count = format!("{name}_count");
        self.samples
            .iter()
            .any(|sample| sample.name == name || sample.name == count)
    }

    /// All values of one label of the samples of this name.
    pub fn label_values(&self, name: &str, label: &str) -> Vec<String> {
        self.matching(name, &[])
            .filter_map(|sample| sample.labels.get(label).cloned())
            .collect()
    }

    fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(key, value)| sample.labels.get(*key).is_some_and(|v| v == value))
        })
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let (series, value) = line.rsplit_once(' ')?;
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        other => other.parse().ok()?,
    };
    let Some((name, rest)) = series.split_once('{') else {
        return Some(Sample {
            name: series.to_owned(),
            labels: BTreeMap::new(),
            value,
        });
    };
    let mut labels = BTreeMap::new();
    let mut rest = rest.strip_suffix('}')?;
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"")?;
        let (text, after) = quoted(after)?;
        labels.insert(key.trim_start_matches(',').to_owned(), text);
        rest = after;
    }
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// Reads up to the closing quote, undoing `\\`, `\"` and `\n`.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let metrics = Metrics::parse(
            "# HELP a b\na{database=\"x\",kind=\"i\\\"n\"} 3\na{database=\"y\"} 4.5\nb 1e3\nh_count 2\n",
        );
        assert_eq!(metrics.value("a", &[("kind", "i\"n")]), Some(3.0));
        assert_eq!(metrics.value("a", &[("database", "z")]), None);
        assert_eq!(metrics.sum("a", &[]), 7.5);
        assert_eq!(metrics.value("b", &[]), Some(1000.0));
        assert!(metrics.has("h") && !metrics.has("i"));
    }
}
