//! The reward of a GRPO stage: a rule and two reward models, each of which moves the weights.

use crate::runs::{done, smoke_with, steps, weights};
use std::path::Path;
use tempfile::TempDir;

/// Prompts whose rule about half of a random model's replies meet: a vowel among the first letters.
/// On the smoke run's own prompts such a model is never right, and a rule that always says 0 could
/// not be told from one that is not asked.
fn write_prompts(path: &Path) {
    let line =
        |n: usize| format!("{{\"prompt\":\"reply {n}: \",\"answer\":\"(?s).{{0,8}}[aeiou].*\"}}\n");
    std::fs::write(path, (0..40).map(line).collect::<String>()).unwrap();
}

#[test]
fn any_reward_weight_set_to_zero_changes_the_resulting_weights() {
    let folder = TempDir::new().unwrap();
    let prompts = folder.path().join("prompts.jsonl");
    write_prompts(&prompts);
    let file = format!("data.sets.prompts.file={:?}", prompts.to_str().unwrap());
    let run = |name: &str, weight: &str| {
        let out = folder.path().join(name);
        let mut set = vec![&*file, "stage.align.reward.0.verifier=regex"];
        set.extend((!weight.is_empty()).then_some(weight));
        done(smoke_with(&out, &set));
        out
    };
    let all = run("all", "");
    let rule = |step: &serde_json::Value| step["rewards"]["regex"].as_f64();
    let rules: Vec<f64> = steps(&all).iter().filter_map(rule).collect();
    assert!(rules.iter().any(|mean| *mean > 0.0 && *mean < 1.0), "no reply differs: {rules:?}");
    let mut results = vec![weights(&all)];
    for (name, entry) in [("rule", 0), ("helpful", 1), ("safety", 2)] {
        let out = run(name, &format!("stage.align.reward.{entry}.weight=0"));
        results.push(weights(&out));
        let before = &results[..results.len() - 1];
        assert!(!before.contains(&results[results.len() - 1]), "{name} does not move the weights");
    }
}
