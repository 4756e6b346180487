//! What a stage starts from, decided without a device.

use super::Place;
use crate::actors::stage_plan::{Folders, prepare_stage, require_artefacts};
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::routing::Balance;
use crate::config::{RunConfig, StageKind};
use crate::engine::phase::{ModelSource, PrepareStage};
use std::path::PathBuf;

fn folders() -> Folders {
    Folders { run: PathBuf::from("/runs/a"), config: PathBuf::from("/configs") }
}

fn plan(config: &RunConfig, index: usize) -> PrepareStage {
    // A folder that is not there has no positions of its own: which it is plays no part here.
    let model = config.stage_model(&folders().config, index).unwrap_or(config.model.clone());
    prepare_stage(config, &folders(), index, 10, &model)
}

fn folder(name: &str) -> ModelSource {
    ModelSource::Folder(PathBuf::from("/runs/a/stages").join(name))
}

#[test]
fn a_stage_starts_from_the_last_policy_or_from_what_it_names() {
    let mut config = Place::new().config(&[]);
    assert_eq!(plan(&config, 0).policy, ModelSource::Fresh);
    assert_eq!(plan(&config, 2).policy, folder("02-talk"));
    assert_eq!(plan(&config, 3).policy, folder("02-talk"), "a reward model is no policy");
    config.stages[3].start_from = Some("base".to_string());
    assert_eq!(plan(&config, 3).policy, folder("01-base"));
    let saved = tempfile::tempdir().unwrap();
    let model = serde_json::to_string(&config.model).unwrap();
    std::fs::write(saved.path().join("config.json"), model).unwrap();
    config.stages[3].start_from = Some(saved.path().display().to_string());
    assert_eq!(plan(&config, 3).policy, ModelSource::Folder(saved.path().to_path_buf()));
}

#[test]
fn a_grpo_stage_refers_to_the_folder_it_starts_from_and_loads_only_models_that_count() {
    let mut config = Place::new().config(&[]);
    let first = plan(&config, 3);
    assert_eq!(
        (first.reference, first.balance, first.steps),
        (Some(folder("02-talk")), Balance::NONE, 10)
    );
    assert_eq!(first.rewards["nice"], PathBuf::from("/runs/a/stages/03-nice"));
    let StageKind::Grpo(settings) = &mut config.stages[3].kind else { panic!("stage 4 is GRPO") };
    (settings.kl_weight, settings.reward[1].weight, settings.updates) = (0.0, 0.0, 3);
    let second = plan(&config, 3);
    assert_eq!((second.reference, second.rewards.len(), second.steps), (None, 0, 30));
}

#[test]
fn only_an_exact_grpo_stage_keeps_prompts_in_the_form_it_trains_in() {
    let mut config = Place::new().config(&[]);
    for index in 0..3 {
        assert_eq!(plan(&config, index).prefill, Prefill::ByCost, "stage {index}");
    }
    let grpo = plan(&config, 3);
    assert_eq!((grpo.form, grpo.prefill), (AttentionForm::Absorbed, Prefill::Absorbed));
    config.engine.exact = false;
    for form in [AttentionForm::Expanded, AttentionForm::Absorbed] {
        config.engine.attention = form;
        let grpo = plan(&config, 3);
        assert_eq!((grpo.form, grpo.prefill), (form, Prefill::ByCost), "attention is honoured");
    }
}

#[test]
fn a_grpo_stage_without_a_predecessor_refers_to_the_initial_weights() {
    let mut config = Place::new().config(&[]);
    config.stages.drain(..3);
    let first = plan(&config, 0);
    assert_eq!((first.policy, first.reference), (folder("00-initial"), Some(folder("00-initial"))));
}

#[test]
fn a_reward_model_gets_a_head_and_no_balance_loss() {
    let config = Place::new().config(&[]);
    let (tuned, fitted) = (plan(&config, 1), plan(&config, 2));
    let experts = Balance::of_experts(config.model.aux_loss_alpha);
    assert_eq!((tuned.value_head, tuned.balance), (false, experts));
    assert_eq!((fitted.value_head, fitted.balance), (true, Balance::NONE));
}

#[test]
fn a_long_context_stage_stretches_what_follows_it() {
    let long = "name = \"long\"\nkind = \"long-context\"\nfactor = 2.5";
    let text = super::CONFIG.replacen(
        "name = \"talk\"\nkind = \"sft\"\ndata = \"talks\"\nbatch = 2",
        &format!("{long}\ndata = [{{ set = \"texts\" }}]\nsteps = 1\nbatch = 1\nsequence = 96"),
        1,
    );
    let config = Place::with(&text).config(&[]);
    let context =
        |index| config.stage_model(&folders().config, index).unwrap().max_position_embeddings;
    let contexts: Vec<usize> = (0..4).map(context).collect();
    assert_eq!(contexts, [64, 160, 160, 160]);
    let (yarn, positions) = plan(&config, 1).yarn.expect("a long-context stage has its own");
    let yarn = yarn.expect("YaRN");
    assert_eq!((yarn.factor, yarn.original_max_position_embeddings, positions), (2.5, 64, 160));
    assert!(plan(&config, 3).yarn.is_none(), "the artefact's own config holds it");
}

#[test]
fn an_earlier_artefact_that_is_gone_is_asked_for_and_not_made_again() {
    let config = Place::new().config(&[]);
    let gone = |missing: usize, reached| require_artefacts(&config, reached, |i| i != missing);
    let text = gone(1, 3).unwrap_err().text;
    assert!(
        text.starts_with(
            "stages/02-talk is missing, and the run has checkpoints of the later stage"
        ),
        "{text}"
    );
    assert!(text.ends_with("start again with --fresh"), "{text}");
    let text = gone(1, usize::MAX).unwrap_err().text;
    assert!(text.contains("belongs to another run: remove it"), "{text}");
    assert!(gone(3, 3).is_ok() && gone(1, 1).is_ok() && gone(2, 0).is_ok(), "it is not done yet");
}
