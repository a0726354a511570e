//! Reads what `iptables-save` prints.

use std::borrow::Cow;

/// One line of `iptables-save` that means something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line<'a> {
    /// `*nat`: what follows is about this table.
    Table(&'a str),
    /// `:CHAIN …`: there is this chain.
    Chain(&'a str),
    /// `-A CHAIN …`: a rule, in its own text.
    Rule(&'a str, &'a str),
}

/// Reads a line; `None` for comments, `COMMIT`, and what is no rule.
pub fn line(text: &str) -> Option<Line<'_>> {
    if let Some(table) = text.strip_prefix('*') {
        return Some(Line::Table(table.trim()));
    }
    if let Some(chain) = text.strip_prefix(':') {
        return Some(Line::Chain(chain.split(' ').next()?));
    }
    let (chain, rule) = text.strip_prefix("-A ")?.split_once(' ')?;
    Some(Line::Rule(chain, rule))
}

/// Splits a line into words; those with spaces are in quotes, with backslashes before quotes.
pub fn words(mut text: &str) -> Vec<Cow<'_, str>> {
    let mut words = Vec::new();
    loop {
        text = text.trim_start_matches(' ');
        if text.is_empty() {
            return words;
        }
        let (word, rest) = first_word(text);
        words.push(word);
        text = rest;
    }
}

/// The first word of a text, and what follows it.
fn first_word(text: &str) -> (Cow<'_, str>, &str) {
    let end = text.find([' ', '"']).unwrap_or(text.len());
    if !text[end..].starts_with('"') {
        return (Cow::Borrowed(&text[..end]), &text[end..]);
    }
    if let Some(inner) = text.strip_prefix('"')
        && let Some((word, rest)) = inner.split_once('"')
        && !word.contains('\\')
        && (rest.is_empty() || rest.starts_with(' '))
    {
        return (Cow::Borrowed(word), rest);
    }
    let (mut word, mut quoted) = (String::new(), false);
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if quoted => word.extend(chars.next().map(|(_, c)| c)),
            '"' => quoted = !quoted,
            ' ' if !quoted => return (Cow::Owned(word), &text[at..]),
            c => word.push(c),
        }
    }
    (Cow::Owned(word), "")
}

/// The target of a rule, usually a chain; `None` if it has none.
pub fn target<'a>(words: &'a [Cow<'_, str>]) -> Option<&'a str> {
    words.windows(2).find(|w| w[0] == "-j" || w[0] == "-g").map(|w| &*w[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart() {
        assert_eq!(line("*nat"), Some(Line::Table("nat")));
        assert_eq!(line(":KUBE-SERVICES - [0:0]"), Some(Line::Chain("KUBE-SERVICES")));
        assert_eq!(line("-A INPUT -j ACCEPT"), Some(Line::Rule("INPUT", "-j ACCEPT")));
        for other in ["# a comment", "COMMIT", "", "-A", "-A INPUT", "-P INPUT ACCEPT"] {
            assert_eq!(line(other), None, "{other}");
        }
    }

    #[test]
    fn words_are_those_that_the_tool_was_given() {
        let text = r#"-m comment --comment "a \"b\" c" --comment "" -j X"#;
        assert_eq!(words(text), ["-m", "comment", "--comment", "a \"b\" c", "--comment", "", "-j", "X"]);
        assert_eq!(words(r#"  a"b c"d  "e f" "g"h "i \\" "j"#), ["ab cd", "e f", "gh", "i \\", "j"]);
        assert_eq!(words(" "), [""; 0]);
    }
}
