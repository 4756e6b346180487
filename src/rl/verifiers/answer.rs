//! Replies that must equal an answer: as a whole, or in their last line.

use super::verdict::Verdict;

/// The whole reply equals the answer, white space around both apart.
pub fn exact(reply: &str, answer: &str) -> Verdict {
    if reply.trim() == answer.trim() {
        Verdict::right("equal")
    } else {
        Verdict::wrong("the reply differs from the answer")
    }
}

/// What follows `Answer:` in the last line equals the answer. Otherwise `partial` times the share
/// of blank-separated places that agree, of the longer of the two.
pub fn answer_line(reply: &str, answer: &str, partial: f64) -> Verdict {
    let last = reply.trim_end().lines().next_back().unwrap_or_default();
    let Some(given) = last.strip_prefix("Answer:") else {
        return Verdict::wrong("the last line is no `Answer:` line");
    };
    let (given, answer) = (given.trim(), answer.trim());
    if given.is_empty() {
        return Verdict::wrong("nothing follows `Answer:`");
    }
    if given == answer {
        return Verdict::right("equal");
    }
    let places = |text: &str| text.split_whitespace().map(str::to_string).collect::<Vec<_>>();
    let (given, answer) = (places(given), places(answer));
    let same = given.iter().zip(&answer).filter(|(given, answer)| given == answer).count();
    let longest = given.len().max(answer.len());
    // Equal places under other blanks are not equal text: never as much as the whole.
    let score = (partial * same as f64 / longest as f64).clamp(0.0, 1.0 - f64::EPSILON);
    Verdict { score, passed: false, reason: format!("{same} of {longest} places agree") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_line_counts_and_it_must_begin_with_answer() {
        let score = |reply: &str| answer_line(reply, "k p n u", 0.5).score;
        assert_eq!(score("swap: k u n p\nAnswer: k p n u"), 1.0);
        assert_eq!(score("Answer: k p n u"), 1.0);
        assert_eq!(score("Answer: k p n u\n"), 1.0);
        assert_eq!(score("Answer:k p n u"), 1.0);
        assert_eq!(score("Answer: k p n u\nswap: k u n p"), 0.0);
        assert_eq!(score("The Answer: k p n u"), 0.0);
        assert_eq!(score("answer: k p n u"), 0.0);
        assert_eq!(score("Answer: x y z w\nAnswer: k p n u"), 1.0);
        assert_eq!(score(""), 0.0);
        assert_eq!(score("Answer:"), 0.0);
    }

    #[test]
    fn partial_credit_counts_places_of_the_longer_text() {
        let score = |reply: &str| answer_line(reply, "k p n u", 0.5).score;
        assert_eq!(score("Answer: k p u n"), 0.25);
        assert_eq!(score("Answer: k p n"), 0.375);
        assert_eq!(score("Answer: k p n u k p n u"), 0.25);
        assert_eq!(score("Answer: u n p k"), 0.0);
        assert_eq!(score("Answer: kpnu"), 0.0);
        assert_eq!(score("Answer: k  p n u"), 0.5, "other blanks are a partly right answer");
        assert_eq!(answer_line("Answer: k p u n", "k p n u", 0.0).score, 0.0);
    }

    #[test]
    fn exact_compares_all_but_the_blanks_around() {
        assert!(exact(" 42\n", "42").passed);
        assert!(!exact("42.", "42").passed);
        assert!(!exact("It is 42", "42").passed);
    }
}
