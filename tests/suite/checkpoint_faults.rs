//! Commits of several ranks: whole or not there, whatever happens to one of them; and what reads their shards.

use crate::budget::is_alone;
use crate::checkpoints::{OfRank, on_ranks, save};
use crate::engine::{batch, stage};
use crate::ranks::{layout, model};
use crate::ranks_engine::{Layouts, SHARED_EXPERTS, on_engines, on_engines_of, trainer_or_sampler};
use crate::runs::{copy, done, finished, rehearsal};
use rehearsal::checkpoint::shards::{shard_name, write_index};
use rehearsal::checkpoint::{
    Commit, Manifest, Shard, Staging, Store, StoredType, TensorEntry, TensorFolder, export_hf,
    read_model_config, write_model_config, write_shard,
};
use rehearsal::cluster::{Broken, Local};
use rehearsal::config::Fault;
use rehearsal::config::cluster::PipelineSchedule::*;
use rehearsal::config::routing::Balance;
use rehearsal::engine::hybrid::{HybridEngine, SavedState};
use rehearsal::engine::phase::*;
use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const ONE: Layouts =
    Layouts { sizes: [1, 1, 1], schedule: OneForwardOneBackward, sampling_expert: 1, tensor: 1 };
const FOUR: Layouts =
    Layouts { sizes: [2, 2, 2], schedule: ZeroBubbleV, sampling_expert: 1, tensor: 1 };

fn prepared(engine: &mut HybridEngine) {
    engine.prepare(&PrepareStage { balance: Balance::NONE, ..stage(None) }).unwrap();
}

/// One step of training; its loss.
fn step(engine: &mut HybridEngine) -> f64 {
    engine.enter_phase(Phase::Train).unwrap();
    engine.train(&batch()).unwrap().loss
}

fn manifest(saved: SavedState) -> Manifest {
    Manifest {
        stage: "base".to_string(),
        step: saved.optimizer_step,
        policy_version: saved.policy_version,
        optimizer_step: saved.optimizer_step,
        ..Manifest::default()
    }
}

/// Commits what all ranks saved, or says what all of them were told.
fn commit(
    store: &mut Store,
    staging: Staging,
    saved: Vec<anyhow::Result<SavedState>>,
) -> Result<Commit, String> {
    let told: Vec<Option<String>> =
        saved.iter().map(|saved| saved.as_ref().err().map(|e| format!("{e:#}"))).collect();
    assert!(told.iter().all(|other| *other == told[0]), "all ranks are told the same: {told:?}");
    match &told[0] {
        Some(error) => Err(error.clone()),
        None => Ok(store.commit(staging, manifest(*saved[0].as_ref().unwrap())).unwrap()),
    }
}

fn files(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn engines_commit_together_and_go_on_in_other_layouts() {
    let run = TempDir::new().unwrap();
    let mut store = Store::open(run.path(), 2).unwrap();
    let straight = on_engines(ONE, |engine, _| {
        prepared(engine);
        [step(engine), step(engine), step(engine)]
    })[0];
    let staging = store.begin("base-1").unwrap();
    let folder = staging.path().to_path_buf();
    let saved = on_engines(FOUR, |engine, _| {
        prepared(engine);
        step(engine);
        // A scored policy lends its weights to the scoring.
        engine.enter_phase(Phase::Score).unwrap();
        engine.save(&folder, true)
    });
    commit(&mut store, staging, saved).unwrap();
    let Commit { folder, manifest } = store.latest().unwrap().commit.unwrap();
    let shards = |stem: &str| manifest.files.keys().filter(|name| name.starts_with(stem)).count();
    assert_eq!((shards("model-"), shards("optimizer-")), (4, 4));
    assert_eq!(files(&folder).len(), 4 + 4 + 2 + 2, "indices, config and manifest beside them");
    let state = SavedState { policy_version: 1, optimizer_step: 1 };
    for layouts in [ONE, FOUR, Layouts { sizes: [3, 1, 1], ..ONE }] {
        let losses = on_engines(layouts, |engine, _| {
            prepared(engine);
            engine.restore(&folder, &state).unwrap();
            [step(engine), step(engine)]
        });
        for loss in losses {
            let apart = (loss[0] - straight[1]).abs().max((loss[1] - straight[2]).abs());
            assert!(apart < 1e-3, "{layouts:?}: {loss:?} against {straight:?}");
        }
    }
}

#[test]
fn ranks_that_only_sample_take_their_part_of_what_trainers_saved() {
    let place = TempDir::new().unwrap();
    let state = on_engines(FOUR, |engine, _| {
        prepared(engine);
        step(engine);
        engine.save(place.path(), true).unwrap()
    })[0];
    let sampled = |engine: &mut HybridEngine| {
        engine.restore(place.path(), &state).unwrap();
        engine.enter_phase(Phase::Generate).unwrap();
        let mut groups: Vec<TokenGroup> = Vec::new();
        let job = crate::ranks_engine::job(state.policy_version);
        engine.generate(&job, &mut |group| groups.push(group)).unwrap();
        groups
    };
    let one = on_engines(ONE, |engine, _| {
        prepared(engine);
        sampled(engine)
    });
    let spill = TempDir::new().unwrap();
    let many: Vec<_> = std::thread::scope(|scope| {
        let start = |(rank, link): (usize, Local)| {
            let (sampled, other) = (&sampled, spill.path());
            let spill = other.join(rank.to_string());
            scope.spawn(move || {
                let mut engine = trainer_or_sampler(rank, link, spill, SHARED_EXPERTS);
                let groups = sampled(&mut engine);
                // They have another part of the policy than who trains, and nothing to save.
                assert_eq!(engine.save(other, true).is_err(), rank > 0);
                groups
            })
        };
        let ranks: Vec<_> = Local::new(3).into_iter().enumerate().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let sorted = |mut groups: Vec<TokenGroup>| {
        groups.sort_by_key(|group| group.slot);
        groups
    };
    let one = sorted(one.concat());
    assert_eq!(sorted(many[1..].concat()), one, "the samplers' groups");
    assert_eq!(sorted(many[0].clone()), one, "the trainer's");
}

#[test]
fn a_full_disk_on_one_rank_fails_the_commit_on_all_and_leaves_the_one_before() {
    let run = TempDir::new().unwrap();
    let mut store = Store::open(run.path(), 1).unwrap();
    let begun: Vec<Staging> =
        (1..6).map(|number| store.begin(&format!("base-{number}")).unwrap()).collect();
    // Where no room is left: a shard of weights, one of moments, what rank 0 writes for all, and nowhere.
    let full = [
        ("", ""),
        ("model-00002-of-00004.safetensors", "rank 1"),
        ("optimizer-00003-of-00004.safetensors", "rank 2"),
        ("model.safetensors.index.json", "rank 0"),
        ("", ""),
    ];
    for (staging, (file, _)) in begun.iter().zip(full).filter(|(_, (file, _))| !file.is_empty()) {
        symlink("/dev/full", staging.path().join(file)).unwrap();
    }
    let folders: Vec<_> = begun.iter().map(|staging| staging.path().to_path_buf()).collect();
    let mut saved = on_engines(FOUR, |engine, _| {
        prepared(engine);
        let save = |folder| {
            step(engine);
            engine.save(folder, true)
        };
        folders.iter().map(|folder| folder.as_path()).map(save).collect::<Vec<_>>()
    });
    for (staging, (file, rank)) in begun.into_iter().zip(full) {
        let saved: Vec<_> = saved.iter_mut().map(|saved| saved.remove(0)).collect();
        if file.is_empty() {
            commit(&mut store, staging, saved).unwrap();
            continue;
        }
        let code = |saved: &anyhow::Result<SavedState>| {
            saved.as_ref().unwrap_err().downcast_ref().map(Fault::exit_code)
        };
        assert!(saved.iter().all(|saved| code(saved) == Some(4)), "{file}");
        let told = commit(&mut store, staging, saved).unwrap_err();
        assert!(told.starts_with(rank) && told.contains(file), "{told}");
        assert!(told.contains("free some space"), "{told}");
        assert_eq!(store.latest().unwrap().commit.unwrap().manifest.step, 1, "the one before");
    }
    assert_eq!(store.latest().unwrap().commit.unwrap().manifest.step, 5);
    assert_eq!(files(&run.path().join("checkpoints")).len(), 1, "nothing aborted is left");
}

#[test]
fn a_rank_that_dies_or_saves_another_step_is_named_by_all_others() {
    let folder = TempDir::new().unwrap();
    let saved = on_engines(FOUR, |engine, rank| {
        prepared(engine);
        (rank != 2).then(|| engine.save(folder.path(), true).unwrap_err())
    });
    for error in saved.into_iter().flatten() {
        assert!(matches!(error.downcast_ref(), Some(Broken::Gone { gone: 2, .. })), "{error:#}");
    }
    let apart = on_ranks(&model(), layout(4, 1, 1, OneForwardOneBackward), |team| {
        let mut rank = OfRank::new(&model(), team, false);
        rank.fill(if team.rank() == 3 { 8 } else { 7 });
        rank.save(&model(), team, folder.path()).unwrap_err().to_string()
    });
    for error in apart {
        assert!(error.contains("rank 3") && error.contains("optimizer step 8"), "{error}");
    }
}

#[test]
fn what_no_rank_wrote_in_a_commit_gets_into_none() {
    let run = TempDir::new().unwrap();
    let mut store = Store::open(run.path(), 1).unwrap();
    let (aborted, staging) = (store.begin("base-1").unwrap(), store.begin("base-1").unwrap());
    assert_ne!(aborted.path(), staging.path(), "who is late finds another place");
    let late = aborted.path().to_path_buf();
    drop(aborted);
    assert!(!late.exists());
    save(&model(), layout(2, 1, 1, ZeroBubbleH1), false, 1, staging.path());
    let stale = "model-00003-of-00004.safetensors";
    std::fs::copy(
        staging.path().join("model-00001-of-00002.safetensors"),
        staging.path().join(stale),
    )
    .unwrap();
    let state = SavedState { policy_version: 1, optimizer_step: 1 };
    let error = format!("{:#}", store.commit(staging, manifest(state)).unwrap_err());
    assert!(error.contains(stale) && error.contains("no rank wrote it"), "{error}");
    for (gone, word) in [(true, "that all ranks share"), (false, "its rank wrote")] {
        let staging = store.begin("base-1").unwrap();
        save(&model(), layout(2, 1, 1, ZeroBubbleH1), false, 1, staging.path());
        let shard = staging.path().join("optimizer-00002-of-00002.safetensors");
        match gone {
            true => std::fs::remove_file(&shard).unwrap(),
            false => std::fs::write(&shard, "short").unwrap(),
        }
        let error = format!("{:#}", store.commit(staging, manifest(state)).unwrap_err());
        assert!(error.contains("optimizer-00002") && error.contains(word), "{error}");
    }
    assert!(files(&run.path().join("checkpoints")).is_empty());
}

/// What a rank of another layout is told of a folder.
fn refused(folder: &Path) -> String {
    let config = model();
    let errors = on_ranks(&config, layout(1, 1, 1, OneForwardOneBackward), |team| {
        let mut rank = OfRank::new(&config, team, false);
        let error = rank.restore(folder).unwrap_err();
        assert!(matches!(error.chain().last().unwrap().downcast_ref(), Some(Fault::User(_))));
        format!("{error:#}")
    });
    errors.into_iter().next().unwrap()
}

#[test]
fn shards_that_are_missing_of_another_step_or_named_twice_are_refused_by_name() {
    let folders = [(); 2].map(|()| TempDir::new().unwrap());
    let [good, other] = [0, 1].map(|i| folders[i].path());
    save(&model(), layout(2, 2, 1, ZeroBubbleH1), false, 7, good);
    save(&model(), layout(2, 2, 1, ZeroBubbleH1), false, 8, other);
    for shard in ["model-00003-of-00004.safetensors", "optimizer-00001-of-00004.safetensors"] {
        let (path, whole) = (good.join(shard), std::fs::read(good.join(shard)).unwrap());
        let index = format!("{}.safetensors.index.json", shard.split('-').next().unwrap());
        std::fs::remove_file(&path).unwrap();
        let told = refused(good);
        assert!(
            told.contains(&format!("{shard}: no such file")) && told.contains(&index),
            "{told}"
        );
        std::fs::copy(other.join(shard), &path).unwrap();
        let told = refused(good);
        for word in [shard, "optimizer step 8", "optimizer step 7", "copy all files from one"] {
            assert!(told.contains(word), "{told}");
        }
        std::fs::write(&path, whole).unwrap();
        // One tensor, named twice by the index.
        let text = std::fs::read_to_string(good.join(&index)).unwrap();
        let (first, rest) = text.split_once("\"weight_map\": {").unwrap();
        let twice = rest.trim_start().split(',').next().unwrap();
        let twice = format!("{first}\"weight_map\": {{{twice},{rest}");
        std::fs::write(good.join(&index), twice).unwrap();
        let told = refused(good);
        assert!(told.contains(&index) && told.contains(" twice, in "), "{told}");
        std::fs::write(good.join(&index), text).unwrap();
    }
}

#[test]
fn a_changed_byte_of_any_shard_is_found_by_the_rank_that_reads_it_and_told_by_all() {
    let run = TempDir::new().unwrap();
    let mut store = Store::open(run.path(), 1).unwrap();
    let staging = store.begin("base-0").unwrap();
    save(&model(), layout(2, 1, 2, ZeroBubbleH1), false, 7, staging.path());
    write_model_config(staging.path(), &model()).unwrap();
    let state = SavedState { policy_version: 7, optimizer_step: 7 };
    let folder = store.commit(staging, manifest(state)).unwrap().folder;
    let damaged: Vec<String> =
        files(&folder).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert_eq!(damaged.len(), 4);
    let mut finders = BTreeSet::new();
    for name in damaged {
        let (path, whole) = (folder.join(&name), std::fs::read(folder.join(&name)).unwrap());
        let mut bytes = whole.clone();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let told = on_engines(Layouts { sizes: [3, 1, 1], ..ONE }, |engine, _| {
            prepared(engine);
            let error = engine.restore(&folder, &state).unwrap_err();
            assert_eq!(error.downcast_ref().map(Fault::exit_code), Some(2));
            // A stage that starts from it is told the same.
            let policy = ModelSource::Folder(folder.clone());
            let started = engine.prepare(&PrepareStage { policy, ..stage(None) }).unwrap_err();
            assert_eq!(format!("{started:#}"), format!("{error:#}"));
            format!("{error:#}")
        });
        for error in &told {
            assert!(error.contains(&name) && error.contains("damaged"), "{error}");
            assert_eq!(error, &told[0]);
        }
        finders.insert(told[0].split_once(": ").unwrap().0.to_string());
        std::fs::write(&path, whole).unwrap();
    }
    assert!(finders.len() > 1, "each reads its share: {finders:?}");
}

/// Body of the process that the test below kills; does nothing otherwise.
#[test]
fn child_whose_ranks_commit_until_it_is_killed() {
    let Some(run) = std::env::var_os("REHEARSAL_TEST_RANKS_RUN") else { return };
    let mut store = Store::open(Path::new(&run), 1).unwrap();
    commit_next(&mut store);
}

/// Lets four ranks commit one step more than the newest commit has.
fn commit_next(store: &mut Store) -> u64 {
    let done = store.latest().unwrap().commit.map_or(0, |commit| commit.manifest.step);
    let staging = store.begin(&format!("base-{}", done + 1)).unwrap();
    save(&model(), layout(2, 2, 1, ZeroBubbleH1), false, done + 1, staging.path());
    let state = SavedState { policy_version: done + 1, optimizer_step: done + 1 };
    store.commit(staging, manifest(state)).unwrap();
    done + 1
}

#[test]
fn killed_anywhere_in_a_commit_of_several_ranks_the_newest_whole_checkpoint_is_found() {
    let points = [
        ("checkpoint-begin", 1),
        ("checkpoint-write:1", 1),
        ("checkpoint-write:100", 1),
        ("checkpoint-own-written:1", 1),
        ("checkpoint-own-written:4", 1),
        ("checkpoint-before-manifest", 1),
        ("checkpoint-before-rename", 1),
        ("checkpoint-after-rename", 2),
        ("checkpoint-mid-prune", 2),
    ];
    for (point, found) in points {
        let run = TempDir::new().unwrap();
        let mut store = Store::open(run.path(), 1).unwrap();
        assert_eq!(commit_next(&mut store), 1);
        let test = "checkpoint_faults::child_whose_ranks_commit_until_it_is_killed";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", test]).env("REHEARSAL_TEST_RANKS_RUN", run.path());
        child.env("REHEARSAL_FAIL_AT", point);
        child.env("REHEARSAL_FAIL_WITNESS", run.path().join("witness"));
        assert!(!child.output().unwrap().status.success(), "{point} must kill");
        let witness = std::fs::read_to_string(run.path().join("witness")).unwrap();
        assert_eq!(witness.trim(), point.split(':').next().unwrap());
        let mut store = Store::open(run.path(), 1).unwrap();
        let commit = store.latest().unwrap().commit.unwrap();
        assert_eq!(commit.manifest.step, found, "{point}");
        // What is found is whole, and the run goes on from it.
        on_ranks(&model(), layout(3, 1, 1, OneForwardOneBackward), |team| {
            OfRank::new(&model(), team, false).restore(&commit.folder).unwrap();
        });
        assert_eq!(commit_next(&mut store), found + 1, "{point}");
        assert_eq!(files(&run.path().join("checkpoints")).len(), 1, "{point} left something");
    }
}

#[test]
fn commands_read_the_shards_of_many_ranks_as_one_model() {
    let whole = finished().join("stages/06-align");
    let config = read_model_config(&whole).unwrap();
    let place = TempDir::new().unwrap();
    let shards = place.path().join("shards");
    std::fs::create_dir(&shards).unwrap();
    let layouts =
        Layouts { sizes: [2, 2, 2], schedule: ZeroBubbleH1, sampling_expert: 1, tensor: 1 };
    on_engines_of(&config, layouts, |engine, _| {
        // A stage that starts from another's artefact, on many ranks.
        let policy = ModelSource::Folder(whole.clone());
        let stage = PrepareStage { policy, balance: Balance::NONE, ..stage(None) };
        engine.prepare(&stage).unwrap();
        engine.save(&shards, false).unwrap();
    });
    assert!(shards.join("model.safetensors.index.json").exists());
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        if whole.join(file).exists() {
            std::fs::copy(whole.join(file), shards.join(file)).unwrap();
        }
    }
    let said = |arguments: &[&str], model: &Path| {
        let mut command = rehearsal(arguments);
        command.arg(model).args(["--json", "--threads", "1"]);
        command
    };
    let text = place.path().join("text.jsonl");
    std::fs::write(&text, "{\"text\": \"rotate: p u n k\"}\n").unwrap();
    let told = |model: &Path| {
        let mut generate = said(&["generate"], model);
        generate.args(["--prompt", "rotate: p u n k", "--temperature", "0", "--max-tokens", "8"]);
        let reply: serde_json::Value = serde_json::from_slice(&done(generate).stdout).unwrap();
        let mut score = said(&["score"], model);
        score.arg("--input").arg(&text);
        (reply["tokens"].clone(), done(score).stdout)
    };
    assert_eq!(told(&shards), told(&whole));
    let gguf = |model: &Path, name: &str| {
        let mut command = rehearsal(&["export", "--format", "gguf", "--dtype", "f32"]);
        let out = place.path().join(name).join("model.gguf");
        command.arg(model).arg("--out").arg(&out);
        done(command);
        std::fs::read(out).unwrap()
    };
    assert!(gguf(&shards, "a") == gguf(&whole, "b"), "one GGUF file, whoever wrote the model");
    let exported = |model: &Path, name: &str| {
        let out = place.path().join(name);
        export_hf(model, &out, StoredType::F32).unwrap();
        TensorFolder::open(&out).unwrap()
    };
    let (many, one) = (exported(&shards, "c"), exported(&whole, "d"));
    assert_eq!(many.names().len(), one.names().len());
    for name in one.names() {
        assert_eq!(many.shape(name), one.shape(name));
        assert_eq!(many.read_f32(name).unwrap(), one.read_f32(name).unwrap(), "{name}");
    }
    // A rank's model starts from shards too, and a folder of both kinds is read by its index.
    let both = place.path().join("both");
    copy(&shards, &both);
    std::fs::write(both.join("model.safetensors"), "not looked at").unwrap();
    assert!(TensorFolder::open(&both).is_ok());
}

/// The most memory that this process has had, files that it has mapped included.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    1024 * peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

#[test]
fn an_export_holds_a_tensor_at_a_time_and_never_the_model() {
    if !is_alone("checkpoint_faults::an_export_holds_a_tensor_at_a_time_and_never_the_model") {
        return;
    }
    const TENSORS: usize = 48;
    const ELEMENTS: usize = 1 << 20;
    let place = TempDir::new().unwrap();
    let source = place.path().join("source");
    std::fs::create_dir(&source).unwrap();
    write_model_config(&source, &model()).unwrap();
    std::fs::write(source.join("tokenizer.json"), r#"{"added_tokens":[],"model":{"vocab":{}}}"#)
        .unwrap();
    let name = |i: usize| if i == 0 { "lm_head.weight".into() } else { format!("part.{i}.weight") };
    let mut shards: Vec<Shard> = Vec::new();
    for shard in 0..4 {
        let own = (0..TENSORS).filter(|i| i % 4 == shard);
        let entries: Vec<TensorEntry> =
            own.map(|i| TensorEntry { name: name(i), shape: vec![ELEMENTS] }).collect();
        let file = shard_name("model.safetensors", shard, 4);
        let mut fetch = |i: usize| Ok(vec![i as f32; ELEMENTS]);
        let record = write_shard(&source.join(&file), &entries, "s", &mut fetch).unwrap();
        let tensors = entries.iter().map(|e| (e.name.clone(), 4 * ELEMENTS as u64)).collect();
        shards.push(Shard { file, record, tensors });
    }
    write_index(&source, "model.safetensors", &shards.iter().collect::<Vec<_>>(), "s").unwrap();
    let before = peak_bytes();
    let report = export_hf(&source, &place.path().join("out"), StoredType::F32).unwrap();
    let (model, grew) = ((4 * report.parameters) as u64, peak_bytes() - before);
    println!("a model of {model} bytes was exported, the process grew by {grew}");
    assert_eq!(report.tensors, TENSORS);
    assert!(grew < 4 * 4 * ELEMENTS as u64, "{grew} bytes for a model of {model}");
}
