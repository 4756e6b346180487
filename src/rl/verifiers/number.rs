//! The final number of a reply against that of the answer.
//!
//! A text with `####` (GSM8K) is read after its last `####`, where the first number counts; any
//! other text ends with its final number. Numbers are compared as decimals, digit by digit, so that
//! no rounding makes two of them equal.

use super::verdict::Verdict;

/// Judges by the final number.
pub fn number(reply: &str, answer: &str) -> Verdict {
    let Some(wanted) = final_number(answer) else {
        return Verdict::wrong("the answer holds no number");
    };
    match final_number(reply) {
        None => Verdict::wrong("the reply holds no number"),
        Some(found) if found == wanted => Verdict::right("equal"),
        Some(found) => Verdict::wrong(format!("{found} is not {wanted}")),
    }
}

/// The final number of a text in a normal form: no `+`, commas, leading or trailing zeros.
pub fn final_number(text: &str) -> Option<String> {
    match text.rfind("####") {
        Some(at) => numbers(&text[at + 4..]).next(),
        None => numbers(text).last(),
    }
}

fn numbers(text: &str) -> impl Iterator<Item = String> {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() {
            let begins = bytes[at].is_ascii_digit()
                || bytes[at] == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit);
            if begins {
                let (end, plain) = read(bytes, at);
                let negative = is_negative(&text[..at]);
                at = end;
                return Some(normal(&plain, negative));
            }
            at += 1;
        }
        None
    })
}

/// Reads a number; gives where it ends, and its digits and point.
fn read(bytes: &[u8], start: usize) -> (usize, String) {
    let digits = |from: usize| bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
    let take = |from: usize, count: usize| {
        String::from_utf8_lossy(&bytes[from..from + count]).into_owned()
    };
    let mut end = start + digits(start);
    let mut plain = take(start, end - start);
    // A comma counts as a separator of thousands only where three digits follow it, and no more.
    if (1..=3).contains(&plain.len()) {
        while bytes.get(end) == Some(&b',') && digits(end + 1) == 3 {
            plain.push_str(&take(end + 1, 3));
            end += 4;
        }
    }
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        let count = digits(end + 1);
        plain.push('.');
        plain.push_str(&take(end + 1, count));
        end += 1 + count;
    }
    (end, plain)
}

/// A minus (with `$` between it and the number allowed) is a sign unless it stands after an
/// operand.
fn is_negative(before: &str) -> bool {
    let before = before.strip_suffix('$').unwrap_or(before);
    let Some(before) = before.strip_suffix(['-', '−']) else { return false };
    let last = before.chars().next_back();
    !last.is_some_and(|c| c.is_alphanumeric() || matches!(c, ')' | ']' | '%' | '$'))
}

fn normal(plain: &str, negative: bool) -> String {
    let (whole, fraction) = plain.split_once('.').unwrap_or((plain, ""));
    let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
    let whole = if whole.is_empty() { "0" } else { whole };
    let point = if fraction.is_empty() { "" } else { "." };
    let zero = whole == "0" && fraction.is_empty();
    format!("{}{whole}{point}{fraction}", if negative && !zero { "-" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_number_is_found_in_all_its_forms() {
        for (text, expected) in [
            ("#### 72", "72"),
            ("She sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
            ("#### 5 apples in 3 days", "5"),
            ("#### 1\n#### 2", "2"),
            ("It costs $1,234.50.", "1234.5"),
            ("It costs $1,234.50", "1234.5"),
            ("007", "7"),
            ("3.000", "3"),
            ("-4", "-4"),
            ("It is -$5", "-5"),
            ("It is −5", "-5"),
            ("-0.0", "0"),
            ("16 - 3 = 13", "13"),
            ("16-3", "3"),
            ("f(2)-3", "3"),
            (".5", "0.5"),
            ("5.", "5"),
            ("1,2,3", "3"),
            ("1,2345", "2345"),
            ("12,345,678", "12345678"),
            ("1234,567", "567"),
            ("50%", "50"),
            ("12345678901234567890123", "12345678901234567890123"),
        ] {
            assert_eq!(final_number(text).as_deref(), Some(expected), "{text}");
        }
        for text in ["", "none", "####", "...", "$,-", "3 #### none"] {
            assert_eq!(final_number(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_are_equal_as_decimals_and_never_by_rounding() {
        assert!(number("so 72.0", "#### 72").passed);
        assert!(number("so 1,000", "#### 1000").passed);
        assert!(!number("so 0.30000000000000004", "0.3").passed);
        assert!(!number("72 of 100", "72").passed);
        assert!(!number("-72", "72").passed);
        assert!(!number("9007199254740993", "9007199254740992").passed);
    }
}
