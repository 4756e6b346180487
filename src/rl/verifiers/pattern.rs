//! Replies that must match a regular expression as a whole.
//!
//! The engine has no look-around and no back-references, so that it takes linear time; the size of
//! a compiled pattern is bounded.

use super::verdict::Verdict;
use regex::{Regex, RegexBuilder};

const COMPILED_BYTES: usize = 1 << 20;

/// Judges by a full match, white space around the reply apart.
pub fn pattern(reply: &str, answer: &str) -> Verdict {
    match compile(answer) {
        Err(reason) => Verdict::wrong(reason),
        Ok(pattern) if pattern.is_match(reply.trim()) => Verdict::right("matches"),
        Ok(_) => Verdict::wrong("the reply does not match"),
    }
}

/// Compiles an answer as a pattern of the whole reply.
pub fn compile(answer: &str) -> Result<Regex, String> {
    // The answer must be a pattern on its own: `a)(b` is none, though `(?:a)(b)` is. The line break
    // ends a comment of the verbose mode.
    let whole = format!(r"\A(?:{answer}{})\z", if answer.contains("(?x") { "\n" } else { "" });
    let bounded = |text: &str| RegexBuilder::new(text).size_limit(COMPILED_BYTES).build();
    bounded(answer)
        .and_then(|_| bounded(&whole))
        .map_err(|error| format!("the answer is no regular expression: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_match_of_the_whole_reply_counts() {
        assert!(pattern("Sorry.", r"Sorry\.|No\.").passed);
        assert!(pattern("No.\n", r"Sorry\.|No\.").passed);
        assert!(!pattern("Sorry. Yes.", r"Sorry\.|No\.").passed);
        assert!(!pattern("a\nSorry.", r"Sorry\.").passed);
        assert!(!pattern("a\nb", r"(?m)^b$").passed);
        assert!(pattern("a\nb", r"(?s)a.b").passed);
        assert!(pattern("", "").passed);
    }

    #[test]
    fn bad_and_huge_patterns_fail_with_a_reason() {
        assert!(pattern("ab", "a)(b").reason.contains("no regular expression"));
        assert!(!pattern("ab", "a)(b").passed);
        assert!(pattern("a", "(").reason.contains("no regular expression"));
        assert!(!pattern("a", r"((a{100}){100}){100}").passed);
        assert!(!pattern(&"a".repeat(100_000), r"(a+)+b").passed, "no catastrophe either");
    }
}
