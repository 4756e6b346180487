//! Checkpointer: commits, artefacts and the export, each whole or not there at all.
//!
//! It readies a folder, has the worker write the policy into it, adds the tokenizer and hands it to
//! the store, which syncs, hashes and renames. Knows no tensor and no step's meaning.
//!
//! Invariants:
//!   * requests are served one at a time, in order of arrival: whoever asks for the newest commit
//!     after a Director's death is told of the one that was being made, and nothing is written
//!     under it any more
//!   * a request that is repeated after a restart saves again (its job has another id), for the
//!     store has cleared away what the dead actor began

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself, aside};
use crate::checkpoint::tokenizer_json::copy_tokenizer;
use crate::checkpoint::{
    Commit, Latest, Manifest, Staging, Store, StoredType, export_hf, read_model_config,
};
use crate::cluster::wire::{decode, encode};
use crate::config::RunConfig;
use crate::console::Event;
use crate::engine::hybrid::SavedState;
use actix::{Handler, ResponseActFuture};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// See the module.
pub struct Checkpointer {
    post: Post,
    keeper: Arc<Keeper>,
    ports: CheckpointerPorts,
    /// Held from the first to the last touch of the folder; it is fair.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// Whom a [`Checkpointer`] asks.
#[derive(Clone)]
pub struct CheckpointerPorts {
    /// The device, to write its weights.
    pub save: Port<Save>,
    /// The journal, for checkpoints that cannot be used.
    pub record: Port<Record>,
}

/// The run's folder on disk. All methods block.
struct Keeper {
    config: Arc<RunConfig>,
    folder: PathBuf,
    /// Opened at the first use: opening clears away what an interrupted commit left.
    store: Mutex<Option<Store>>,
}

impl Checkpointer {
    /// A checkpointer of the run in `folder`.
    pub fn new(
        post: Post,
        config: Arc<RunConfig>,
        folder: PathBuf,
        ports: CheckpointerPorts,
    ) -> Checkpointer {
        Checkpointer {
            post,
            keeper: Arc::new(Keeper { config, folder, store: Mutex::default() }),
            ports,
            turn: Arc::default(),
        }
    }
}

answers_for_itself!(Checkpointer);

impl Handler<FindCommit> for Checkpointer {
    type Result = ResponseActFuture<Self, Result<Option<Commit>, Failure>>;

    fn handle(&mut self, _: FindCommit, _: &mut Self::Context) -> Self::Result {
        let (keeper, record) = (Arc::clone(&self.keeper), self.ports.record.clone());
        let turn = Arc::clone(&self.turn);
        self.post.work(FindCommit::NAME, async move {
            let _turn = turn.lock().await;
            let Latest { commit, rejected } =
                aside(move || keeper.with_store(Store::latest)).await?;
            for one in rejected {
                let event =
                    Event::new("rejected").with("folder", &one.folder).with("reason", &one.reason);
                record.ask(Record { event }).await?;
            }
            Ok(commit)
        })
    }
}

impl Handler<CommitCheckpoint> for Checkpointer {
    type Result = ResponseActFuture<Self, Result<Commit, Failure>>;

    fn handle(&mut self, message: CommitCheckpoint, _: &mut Self::Context) -> Self::Result {
        let CommitCheckpoint { id, place, ahead } = message;
        let (keeper, save) = (Arc::clone(&self.keeper), self.ports.save.clone());
        let id = id.part(self.post.generation() as u32);
        let turn = Arc::clone(&self.turn);
        self.post.work(CommitCheckpoint::NAME, async move {
            let _turn = turn.lock().await;
            let name = format!("{}-{}", place.name, place.step);
            let begun = Arc::clone(&keeper);
            let staging = aside(move || begun.with_store(|store| store.begin(&name))).await?;
            let folder = staging.path().to_path_buf();
            let state = save.ask(Save { id, folder, with_optimizer: true }).await?;
            let write = move || {
                if let Some(batch) = ahead {
                    write_ahead(staging.path(), &batch)?;
                }
                keeper.commit(staging, &place, state)
            };
            aside(write).await
        })
    }
}

impl Handler<FindAhead> for Checkpointer {
    type Result = ResponseActFuture<Self, Result<Option<Box<SampledBatch>>, Failure>>;

    fn handle(&mut self, message: FindAhead, _: &mut Self::Context) -> Self::Result {
        let turn = Arc::clone(&self.turn);
        self.post.work(FindAhead::NAME, async move {
            let _turn = turn.lock().await;
            aside(move || read_ahead(&message.folder)).await
        })
    }
}

/// The file of a batch that was sampled for the step behind a commit.
const AHEAD_FILE: &str = "ahead.msgpack";

fn write_ahead(folder: &Path, batch: &SampledBatch) -> anyhow::Result<()> {
    let path = folder.join(AHEAD_FILE);
    std::fs::write(&path, encode(batch))
        .with_context(|| format!("failed to write {}", path.display()))
}

/// The manifest has vouched for the bytes.
fn read_ahead(folder: &Path) -> anyhow::Result<Option<Box<SampledBatch>>> {
    let path = folder.join(AHEAD_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let bytes =
        std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let batch =
        decode(&bytes).with_context(|| format!("{}: of another version", path.display()))?;
    Ok(Some(Box::new(batch)))
}

impl Handler<KeepArtefact> for Checkpointer {
    type Result = ResponseActFuture<Self, Result<PathBuf, Failure>>;

    fn handle(&mut self, message: KeepArtefact, _: &mut Self::Context) -> Self::Result {
        let KeepArtefact { id, name, place } = message;
        let (keeper, save) = (Arc::clone(&self.keeper), self.ports.save.clone());
        let id = id.part(self.post.generation() as u32);
        let turn = Arc::clone(&self.turn);
        self.post.work(KeepArtefact::NAME, async move {
            let _turn = turn.lock().await;
            let begun = Arc::clone(&keeper);
            let staging =
                aside(move || begun.with_store(|store| store.begin_artefact(&name))).await?;
            let folder = staging.path().to_path_buf();
            let state = save.ask(Save { id, folder, with_optimizer: false }).await?;
            aside(move || keeper.keep(staging, &place, state)).await
        })
    }
}

impl Handler<ExportModel> for Checkpointer {
    type Result = ResponseActFuture<Self, Result<PathBuf, Failure>>;

    fn handle(&mut self, message: ExportModel, _: &mut Self::Context) -> Self::Result {
        let out = self.keeper.folder.join("export");
        let turn = Arc::clone(&self.turn);
        self.post.work(ExportModel::NAME, async move {
            let _turn = turn.lock().await;
            aside(move || Ok(export_hf(&message.from, &out, StoredType::F32)?.out)).await
        })
    }
}

impl Keeper {
    fn with_store<R>(
        &self,
        act: impl FnOnce(&mut Store) -> anyhow::Result<R>,
    ) -> anyhow::Result<R> {
        let mut store = self.store.lock().expect("a panic here ends the actor that owns it");
        let store = match &mut *store {
            Some(store) => store,
            closed => closed.insert(Store::open(&self.folder, self.config.checkpoint.keep)?),
        };
        act(store)
    }

    fn commit(&self, staging: Staging, place: &Place, state: SavedState) -> anyhow::Result<Commit> {
        self.add_tokenizer(staging.path())?;
        self.with_store(|store| store.commit(staging, self.manifest(place, state)))
    }

    fn keep(&self, staging: Staging, place: &Place, state: SavedState) -> anyhow::Result<PathBuf> {
        self.add_tokenizer(staging.path())?;
        self.with_store(|store| store.finish_artefact(staging, self.manifest(place, state)))
    }

    /// A kept model speaks the run's language wherever it is carried.
    fn add_tokenizer(&self, folder: &Path) -> anyhow::Result<()> {
        copy_tokenizer(&self.folder, folder, &read_model_config(folder)?)
    }

    fn manifest(&self, place: &Place, state: SavedState) -> Manifest {
        Manifest {
            stage: place.name.clone(),
            stage_index: place.stage,
            step: place.step,
            finished_stage: place.finished,
            policy_version: state.policy_version,
            optimizer_step: state.optimizer_step,
            seed: self.config.seed,
            config_identity: self.config.identity(),
            ..Manifest::default()
        }
    }
}
