//! The verdict on a reply, and which program gives it.

use super::{annotations, answer, number, pattern};
use crate::config::stage::VerifierKind;

/// What a verifier says.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// From 0 to 1; between them only as partial credit or a share.
    pub score: f64,
    /// True if the reply is wholly right.
    pub passed: bool,
    /// Why.
    pub reason: String,
}

impl Verdict {
    pub(super) fn right(reason: impl Into<String>) -> Verdict {
        Verdict { score: 1.0, passed: true, reason: reason.into() }
    }

    pub(super) fn wrong(reason: impl Into<String>) -> Verdict {
        Verdict { score: 0.0, passed: false, reason: reason.into() }
    }
}

/// Judges a reply. `partial` is the credit for a partly right answer line, as a share of 1; `ended`
/// says that the model ended the reply itself. A reply that was cut off has no last line and no
/// whole text, so that it fails all verifiers but the two that look for numbers in it.
pub fn verify(kind: VerifierKind, partial: f64, reply: &str, ended: bool, answer: &str) -> Verdict {
    let needs_end = match kind {
        VerifierKind::Exact | VerifierKind::AnswerLine | VerifierKind::Regex => true,
        VerifierKind::Number | VerifierKind::Annotations => false,
    };
    if needs_end && !ended {
        return Verdict::wrong("the reply was cut off");
    }
    match kind {
        VerifierKind::Exact => answer::exact(reply, answer),
        VerifierKind::AnswerLine => answer::answer_line(reply, answer, partial),
        VerifierKind::Number => number::number(reply, answer),
        VerifierKind::Regex => pattern::pattern(reply, answer),
        VerifierKind::Annotations => annotations::annotations(reply),
    }
}

/// Says why an answer of a data set can never be matched by a verifier.
pub fn check_answer(kind: VerifierKind, answer: &str) -> Result<(), String> {
    match kind {
        VerifierKind::Exact | VerifierKind::Annotations => Ok(()),
        VerifierKind::AnswerLine if answer.trim().is_empty() => {
            Err("the answer is empty".to_string())
        }
        VerifierKind::AnswerLine if answer.trim().contains('\n') => {
            Err("the answer has several lines".to_string())
        }
        VerifierKind::AnswerLine => Ok(()),
        VerifierKind::Number => {
            number::final_number(answer).map(|_| ()).ok_or("the answer holds no number".to_string())
        }
        VerifierKind::Regex => pattern::compile(answer).map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [VerifierKind; 5] = [
        VerifierKind::Exact,
        VerifierKind::AnswerLine,
        VerifierKind::Number,
        VerifierKind::Regex,
        VerifierKind::Annotations,
    ];

    #[test]
    fn a_cut_off_reply_passes_only_where_numbers_are_looked_for() {
        let reply = "<<1+1=2>>\nAnswer: 2";
        let pattern = regex::escape(reply);
        for (kind, answer, cut) in [
            (VerifierKind::Exact, reply, false),
            (VerifierKind::AnswerLine, "2", false),
            (VerifierKind::Regex, &pattern, false),
            (VerifierKind::Number, "2", true),
            (VerifierKind::Annotations, "", true),
        ] {
            assert!(verify(kind, 0.5, reply, true, answer).passed, "{kind:?}");
            let verdict = verify(kind, 0.5, reply, false, answer);
            assert_eq!((verdict.passed, verdict.score > 0.0), (cut, cut), "{kind:?}");
        }
    }

    #[test]
    fn answers_that_nothing_can_match_are_found_beforehand() {
        assert!(check_answer(VerifierKind::Regex, "(").is_err());
        assert!(check_answer(VerifierKind::Regex, "a+").is_ok());
        assert!(check_answer(VerifierKind::Number, "none").is_err());
        assert!(check_answer(VerifierKind::Number, "#### 1,234").is_ok());
        assert!(check_answer(VerifierKind::AnswerLine, " ").is_err());
        assert!(check_answer(VerifierKind::AnswerLine, "a\nb").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_text_gets_a_score_between_0_and_1(
            reply in "(?s).{0,80}",
            answer in "(?s).{0,20}",
            pieces in proptest::collection::vec("<<|>>|=|[0-9+*/().,$%# -]{0,6}|Answer:|\n", 0..12),
        ) {
            for reply in [reply, pieces.concat()] {
                for kind in ALL {
                    let verdict = verify(kind, 0.5, &reply, true, &answer);
                    assert!((0.0..=1.0).contains(&verdict.score));
                    assert_eq!(verdict.passed, verdict.score == 1.0, "{verdict:?}");
                }
            }
        }
    }
}
