//! A bounded parser of arithmetic: `+ - * /`, parentheses, decimals, `%` after a number.
//!
//! Invariants:
//!   * no text makes it recurse deeper than [`DEPTH_LIMIT`] or read over [`LENGTH_LIMIT`] bytes
//!   * what it returns is finite

/// Deepest nesting of parentheses and signs.
pub const DEPTH_LIMIT: usize = 64;

/// Longest expression in bytes.
pub const LENGTH_LIMIT: usize = 4096;

/// The value of an expression; `None` if it is none, too large, too deep or not finite.
pub fn evaluate(text: &str) -> Option<f64> {
    if text.len() > LENGTH_LIMIT {
        return None;
    }
    let mut parser = Parser { bytes: text.as_bytes(), at: 0 };
    let value = parser.sum(0)?;
    parser.skip_blanks();
    (parser.at == parser.bytes.len() && value.is_finite()).then_some(value)
}

/// A single number with an optional sign, `$`, `%` and commas, and the decimals it is written with.
pub fn plain_number(text: &str) -> Option<(f64, i32)> {
    let text = text.trim();
    let (sign, text) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest.trim_start()),
        None => (1.0, text),
    };
    if text.len() > LENGTH_LIMIT {
        return None;
    }
    let mut parser = Parser { bytes: text.as_bytes(), at: 0 };
    let value = parser.number()?;
    let decimals = text
        .split_once('.')
        .map_or(0, |(_, fraction)| fraction.bytes().take_while(u8::is_ascii_digit).count());
    let done = parser.at == text.len() && value.is_finite();
    let percent = if text.ends_with('%') { 2 } else { 0 };
    done.then_some((sign * value, i32::try_from(decimals).ok()? + percent))
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn skip_blanks(&mut self) {
        while self.bytes.get(self.at).is_some_and(|b| matches!(b, b' ' | b'\t')) {
            self.at += 1;
        }
    }

    /// Takes the next byte after blanks if it is one of `wanted`.
    fn take(&mut self, wanted: &[u8]) -> Option<u8> {
        self.skip_blanks();
        let byte = self.bytes.get(self.at).copied().filter(|byte| wanted.contains(byte))?;
        self.at += 1;
        Some(byte)
    }

    fn sum(&mut self, depth: usize) -> Option<f64> {
        let mut value = self.product(depth)?;
        while let Some(operator) = self.take(b"+-") {
            let right = self.product(depth)?;
            value = if operator == b'+' { value + right } else { value - right };
        }
        Some(value)
    }

    fn product(&mut self, depth: usize) -> Option<f64> {
        let mut value = self.factor(depth)?;
        while let Some(operator) = self.take(b"*/") {
            let right = self.factor(depth)?;
            value = if operator == b'*' { value * right } else { value / right };
        }
        Some(value)
    }

    fn factor(&mut self, depth: usize) -> Option<f64> {
        if depth >= DEPTH_LIMIT {
            return None;
        }
        match self.take(b"(-") {
            Some(b'-') => Some(-self.factor(depth + 1)?),
            Some(_) => {
                let value = self.sum(depth + 1)?;
                self.take(b")").map(|_| value)
            }
            None => self.number(),
        }
    }

    /// Digits with commas between them, a fraction, `$` before and `%` after.
    fn number(&mut self) -> Option<f64> {
        self.take(b"$");
        let start = self.at;
        let mut plain = String::new();
        while let Some(byte) = self.bytes.get(self.at) {
            match byte {
                b'0'..=b'9' => plain.push(char::from(*byte)),
                b'.' if !plain.contains('.') => plain.push('.'),
                b',' if self.at > start => {}
                _ => break,
            }
            self.at += 1;
        }
        let value: f64 = plain.parse().ok()?;
        Some(if self.take(b"%").is_some() { value / 100.0 } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn precedence_signs_and_decimals_are_the_usual_ones() {
        for (text, expected) in [
            ("1+2*3", 7.0),
            ("(1+2)*3", 9.0),
            ("8-3-2", 3.0),
            ("16/4/2", 2.0),
            ("-2*-(3-5)", -4.0),
            (".5 * 4.", 2.0),
            ("1,200/2", 600.0),
            ("20%*50", 10.0),
            ("2--2", 4.0),
        ] {
            assert_eq!(evaluate(text), Some(expected), "{text}");
        }
        for text in
            ["", "()", "1+", "*1", "1 2", "(1", "1)", "1/0", "0/0", ".", ",1", "1e5", "9^9", "½"]
        {
            assert_eq!(evaluate(text), None, "{text}");
        }
    }

    #[test]
    fn depth_and_length_are_bounded() {
        let nested = |depth: usize| format!("{}1{}", "(".repeat(depth), ")".repeat(depth));
        assert_eq!(evaluate(&nested(DEPTH_LIMIT - 1)), Some(1.0));
        assert_eq!(evaluate(&nested(DEPTH_LIMIT)), None);
        assert_eq!(evaluate(&nested(2000)), None);
        assert_eq!(evaluate(&"-".repeat(4000)), None);
        assert_eq!(evaluate(&"(".repeat(1_000_000)), None);
        assert_eq!(evaluate(&format!("1{}", "+1".repeat(2047))), Some(2048.0));
        assert_eq!(evaluate(&format!("1{}", "+1".repeat(2048))), None);
        assert_eq!(evaluate(&"9".repeat(400)), None, "infinite");
    }

    proptest! {
        #[test]
        fn sums_of_products_agree_with_plain_arithmetic(
            terms in proptest::collection::vec((0u32..1000, 1u32..50, proptest::bool::ANY), 1..8),
        ) {
            let mut text = "0".to_string();
            let mut expected = 0.0;
            for (a, b, plus) in terms {
                text.push_str(&format!("{}({a}*{b})", if plus { " + " } else { "-" }));
                let product = f64::from(a) * f64::from(b);
                expected += if plus { product } else { -product };
            }
            prop_assert_eq!(evaluate(&text), Some(expected));
        }

        #[test]
        fn no_text_panics(text in "[0-9+*/().,$% -]{0,60}") {
            let value = evaluate(&text);
            prop_assert!(value.is_none_or(f64::is_finite));
            plain_number(&text);
        }
    }
}
