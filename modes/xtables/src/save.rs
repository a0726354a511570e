//! Reads what `iptables-save` prints.

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
pub fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut any) = (String::new(), false, false);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => word.extend(chars.next()),
            '"' => {
                quoted = !quoted;
                any = true;
            }
            ' ' if !quoted => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            c => word.push(c),
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    words
}

/// The target of a rule, usually a chain; `None` if it has none.
pub fn target(words: &[String]) -> Option<&str> {
    words.windows(2).find(|w| w[0] == "-j" || w[0] == "-g").map(|w| w[1].as_str())
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
    }
}
