//! Everything that reads a file which somebody else may have written.
//!
//! A target has a folder of its own with valid companions; each input takes the place of one file in
//! it, which is then read as a user's command would read it.

use super::mutate::{Corpus, Format};
use super::seeds;
use anyhow::Result;
use rehearsal::checkpoint::{GgufFile, Manifest, Pieces, Store, TensorFolder, read_model_config};
use rehearsal::cli::run_folder::{self, Wish};
use rehearsal::config::data::{FieldMap, Schema, SetConfig};
use rehearsal::config::{Fault, Loaded, RunConfig};
use rehearsal::console::{Board, Journal};
use rehearsal::data::{ChatTemplate, Message, Role, Tokenizer, check_set};
use rehearsal::engine::resident::read_calibration;
use rehearsal::model::{Layout, flops_per_token, parameters};
use rehearsal::plan;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// Reads the input at a path as the product does.
type Read = Box<dyn Fn(&Path) -> Result<()> + Send>;

/// One reader and its valid files.
pub struct Target {
    /// Whose campaign it belongs to.
    pub campaign: &'static str,
    /// The valid files.
    pub corpus: Corpus,
    /// Bytes that may be held beyond those of the file.
    pub bound: usize,
    file: PathBuf,
    read: Read,
    /// The folder is removed with the last target that lies in it.
    folder: Arc<TempDir>,
}

impl Target {
    /// Puts the input in its place and reads it.
    pub fn try_on(&self, input: &[u8]) -> Result<()> {
        std::fs::write(&self.file, input).expect("the folder takes files");
        (self.read)(&self.file)
    }

    /// The folder of every target, which an error's text must name.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Makes targets in one folder.
struct Maker {
    folder: Arc<TempDir>,
    targets: Vec<Target>,
}

impl Maker {
    /// A new folder below the targets' own.
    fn aside(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn add(
        &mut self,
        campaign: &'static str,
        file: PathBuf,
        corpus: Corpus,
        bound: usize,
        read: impl Fn(&Path) -> Result<()> + Send + 'static,
    ) {
        let (folder, read) = (self.folder.clone(), Box::new(read));
        self.targets.push(Target { campaign, corpus, bound, file, read, folder });
    }
}

/// The targets of a campaign.
pub fn targets(campaign: &str) -> Vec<Target> {
    // In memory if the system has such a place.
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let mut maker = Maker { folder: Arc::new(folder.unwrap()), targets: Vec::new() };
    match campaign {
        "safetensors" => safetensors(&mut maker),
        "config" => config(&mut maker),
        "tokenizer" => tokenizer(&mut maker),
        "chat" => chat(&mut maker),
        "checkpoint" => checkpoint(&mut maker),
        "run" => run(&mut maker),
        "lines" => lines(&mut maker),
        "gguf" => gguf(&mut maker),
        other => panic!("no campaign {other}"),
    }
    maker.targets
}

const MIB: usize = 1 << 20;

fn safetensors(maker: &mut Maker) {
    let folder = maker.aside("safetensors");
    let words = &[
        "\"F32\"",
        "\"BF16\"",
        "\"F64\"",
        "\"F4\"",
        "\"U8\"",
        "\"I64\"",
        "\"BOOL\"",
        "[0,0]",
        "[0,48]",
        "[48,68]",
        "[68,0]",
        "[4611686018427387904,4]",
        "[4294967296,4294967296]",
        "[0,18446744073709551615]",
        "\"__metadata__\"",
        "[1,1,1,1,1,1,1,1,1]",
        "\"a.weight\"",
        "\"shape\"",
        "\"data_offsets\"",
    ];
    let corpus = Corpus::new(Format::Safetensors, seeds::tensors(&folder), words);
    maker.add("safetensors", folder.join("model.safetensors"), corpus, MIB, |path| {
        let tensors = TensorFolder::open_file(path)?;
        for name in tensors.names() {
            let count: usize = tensors.shape(name).expect("a listed tensor").iter().product();
            assert_eq!(tensors.read_f32(name)?.len(), count);
        }
        Ok(())
    });
    let folder = maker.aside("sharded");
    let words = &[
        "\"a\"",
        "\"b\"",
        "\"model-00001-of-00002.safetensors\"",
        "\"x.safetensors\"",
        "\"../a.safetensors\"",
    ];
    let corpus = Corpus::new(Format::Json, vec![seeds::index(&folder)], words);
    let index = folder.join("model.safetensors.index.json");
    maker.add("safetensors", index, corpus, MIB, move |_| TensorFolder::open(&folder).map(drop));
    let folder = maker.aside("pieces");
    let words = &["\"m.x.at.2\"", "\"m.x\"", "\"m.x.at.18446744073709551615\"", "\"save\"", "[4]"];
    let corpus = Corpus::new(Format::Safetensors, vec![seeds::pieces(&folder)], words);
    let shard = folder.join("optimizer-00002-of-00002.safetensors");
    maker.add("safetensors", shard, corpus, MIB, move |_| {
        let pieces = Pieces::open(&folder, "optimizer.safetensors")?;
        let mut given = 0;
        pieces.read("m.x", 7, 1..7, &mut |_, numbers| given += numbers.len())?;
        assert_eq!(given, 6);
        Ok(())
    });
}

fn gguf(maker: &mut Maker) {
    let folder = maker.aside("gguf");
    let corpus = Corpus::new(Format::Binary, seeds::ggufs(), &[]);
    maker.add("gguf", folder.join("model.gguf"), corpus, MIB, |path| {
        let mut file = GgufFile::open(path)?;
        let names: Vec<String> = file.names().into_iter().map(str::to_string).collect();
        for name in names {
            let count: usize = file.shape(&name).expect("a listed tensor").iter().product();
            assert_eq!(file.read_f32(&name)?.len(), count);
        }
        Ok(())
    });
}

fn config(maker: &mut Maker) {
    let folder = maker.aside("config");
    let words = &[
        "\"yarn\"",
        "\"linear\"",
        "\"group_limited_greedy\"",
        "\"softmax\"",
        "\"silu\"",
        "\"deepseek_v2\"",
        "1048576",
        "4194304",
        "16777216",
        "10000",
        "\"rope_scaling\"",
        "\"rope_parameters\"",
        "\"factor\"",
        "\"n_group\"",
        "{\"type\":\"yarn\",\"factor\":1e308,\"original_max_position_embeddings\":1}",
    ];
    let corpus = Corpus::new(Format::Json, seeds::configs(&folder), words);
    maker.add("config", folder.join("config.json"), corpus, 320 * MIB, move |_| {
        let model = read_model_config(&folder)?;
        let layout = Layout::new(&model, true);
        let counted = parameters(&model);
        assert_eq!(counted.tensors as usize, layout.specs.len() - 1, "without the scalar head");
        assert_eq!(counted.total as usize, layout.elements() - model.hidden_size);
        assert!(counted.active <= counted.total || model.n_routed_experts == 0);
        plan::model_memory(&model);
        plan::cache_bytes_per_token(&model);
        flops_per_token(&model, model.max_position_embeddings);
        Ok(())
    });
}

fn tokenizer(maker: &mut Maker) {
    let folder = maker.aside("tokenizer");
    let words = &[
        "\"BPE\"",
        "\"WordLevel\"",
        "\"Unigram\"",
        "\"ByteLevel\"",
        "\"Sequence\"",
        "\"FixedLength\"",
        "\"Split\"",
        "\"Precompiled\"",
        "\"Replace\"",
        "\"NFKD\"",
        "\"Digits\"",
        "\"Removed\"",
        "\"MergedWithPrevious\"",
        "{\"Regex\":\"(a+)+$\"}",
        "{\"Regex\":\"\\\\p{N}{1,3}\"}",
        "{\"String\":\"a\"}",
        "{\"String\":\"\"}",
        "{\"type\":\"FixedLength\",\"length\":0}",
        "{\"type\":\"NFC\"}",
        "{\"Fixed\":1152921504606846976}",
        "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":false,\"use_regex\":true}",
        "{\"strategy\":{\"Fixed\":1152921504606846976},\"direction\":\"Right\",\"pad_to_multiple_of\":0,\"pad_id\":0,\"pad_type_id\":0,\"pad_token\":\"x\"}",
        "{\"max_length\":1,\"strategy\":\"LongestFirst\",\"stride\":9}",
        "[\"a\",\"a\"]",
        "\"a a\"",
        "\"<|end|>\"",
        "{\"id\":4294967295,\"content\":\"<|x|>\",\"special\":true}",
        "\"ø\"",
        "\"Ġthe\"",
        "\"truncation\"",
        "\"padding\"",
        "\"pre_tokenizer\"",
        "\"unk_token\"",
        "\"continuing_subword_prefix\"",
        "\"end_of_word_suffix\"",
    ];
    let corpus = Corpus::new(Format::Json, seeds::tokenizers(), words);
    maker.add("tokenizer", folder.join("tokenizer.json"), corpus, 32 * MIB, |path| {
        let tokenizer = Tokenizer::load(path)?;
        for text in ["the cat's 12 mats,\n\n  <|end|>é☃ø\u{0}", &"a ".repeat(200), &" ".repeat(300)]
        {
            let ids = tokenizer.encode_text(text);
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
            tokenizer.decode_with_specials(&ids);
            tokenizer.encode_spans(text);
        }
        tokenizer.decode(&[0, 261, u32::MAX, tokenizer.end(), tokenizer.pad()]);
        Ok(())
    });
}

fn chat(maker: &mut Maker) {
    let folder = maker.aside("chat");
    std::fs::write(folder.join("tokenizer.json"), &seeds::tokenizers()[0]).unwrap();
    let words = &[
        "\"{{ x\"",
        "\"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}\"",
        "\"{{ 'a' * 99999999 }}\"",
        "\"{{ 'a' | indent(99999999) }}\"",
        "\"{{ '%999999999d' | format(1) }}\"",
        "\"{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}\"",
        "\"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}\"",
        "\"{{ range(0, 9999999999) | list }}\"",
        "\"{{ messages[0].content[1:] }}\"",
        "\"{{ messages | tojson(indent=99999999) }}\"",
        "\"{{ 1 // 0 }}{{ 9 ** 999999 }}\"",
        "\"{{ 'a'.split('') }}\"",
        "\"{{ 'a' | batch(0) }}\"",
        "\"{{ 'a' | slice(0) }}{{ 'abc'[::0] }}\"",
        "\"{% include 'chat' %}\"",
        "\"{% extends 'chat' %}\"",
        "\"{{ (messages * 9999999) | list }}\"",
        "\"{{ 'a' | replace('', 'bbbbbbbb') | replace('b', 'cccccccc') }}\"",
        "\"chat_template\"",
        "\"<|end|>\"",
        "{\"content\":\"<|pad|>\"}",
        "{\"name\":\"default\",\"template\":\"{{ y }}\"}",
    ];
    let corpus = Corpus::new(Format::Json, seeds::chats(), words);
    maker.add("chat", folder.join("tokenizer_config.json"), corpus, 64 * MIB, move |_| {
        let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
        let Some(chat) = ChatTemplate::from_folder(&folder)? else { return Ok(()) };
        let messages = [(Role::System, "s"), (Role::User, "2 + 2?"), (Role::Assistant, "4<|end|>")]
            .map(|(role, content)| Message::new(role, content));
        chat.encode_conversation(&tokenizer, &messages)?;
        chat.encode_prompt(&tokenizer, &messages[..2])?;
        Ok(())
    });
}

fn checkpoint(maker: &mut Maker) {
    let run = maker.aside("committed");
    let folder = seeds::checkpoint(&run);
    let manifest = std::fs::read(folder.join("manifest.json")).unwrap();
    let calibration = std::fs::read(folder.join("reward.json")).unwrap();
    let words = &[
        "\"config.json\"",
        "\"../config.json\"",
        "\"/etc/passwd\"",
        "\"model.safetensors\"",
        "\"manifest.json\"",
        "{\"bytes\":0,\"blake3\":\"\"}",
        "\"files\"",
        "\"format\"",
        "\"step\"",
    ];
    let corpus = Corpus::new(Format::Manifest, vec![manifest], words);
    let place = folder.clone();
    maker.add("checkpoint", folder.join("manifest.json"), corpus, MIB, move |_| {
        // A damaged newest checkpoint is reported, not fallen over.
        let latest = Store::open(&run, 2)?.latest();
        assert_eq!(Manifest::verify(&place).is_ok(), latest.is_ok());
        latest?;
        TensorFolder::open(&place).map(drop)
    });
    let folder = maker.aside("reward");
    let words = &["\"mean\"", "\"deviation\"", "-1.0"];
    let corpus = Corpus::new(Format::Json, vec![calibration], words);
    maker.add("checkpoint", folder.join("reward.json"), corpus, MIB, move |_| {
        let read = read_calibration(&folder)?.expect("the file is there");
        assert!(read.mean.is_finite() && read.deviation > 0.0);
        Ok(())
    });
    let folder = maker.aside("journal");
    let words = &[
        "\"event\"",
        "\"step\"",
        "\"stage\"",
        "\"run\"",
        "\"stage-start\"",
        "\"eval\"",
        "\"end\"",
        "\"note\"",
        "\"stages\"",
    ];
    let corpus = Corpus::new(Format::JsonLines, vec![seeds::journal(&folder)], words);
    maker.add("checkpoint", folder.join("journal.jsonl"), corpus, MIB, move |path| {
        let journal = Journal::open(path)?;
        journal.last_step("base");
        Board::read(&folder).map(drop)
    });
    let (_, loaded) = seeds::run_toml(&maker.aside("unused"));
    let folder = maker.aside("record");
    let record = seeds::record(&folder, &loaded);
    let words = &["\"identity\"", "\"finished\"", "\"resume\"", "\"seed\""];
    let corpus = Corpus::new(Format::Json, vec![record], words);
    maker.add("checkpoint", folder.join("run.json"), corpus, MIB, move |_| {
        run_folder::is_finished(&folder, &loaded, Wish::Resume).map(drop)
    });
}

fn run(maker: &mut Maker) {
    let folder = maker.aside("run");
    let (text, _) = seeds::run_toml(&folder);
    let corpus = Corpus::new(Format::Toml, vec![text], &[]);
    maker.add("run", folder.join("run.toml"), corpus, 4 * MIB, |path| {
        let loaded = RunConfig::load(path, &[])?;
        loaded.config.identity();
        planned(&loaded)?;
        let again = loaded.resolved_toml();
        assert!(again.contains("[model]"), "{again}");
        Ok(())
    });
}

/// What a run would cost.
fn planned(loaded: &Loaded) -> Result<()> {
    let models: Result<Vec<_>, _> = (0..loaded.config.stages.len())
        .map(|index| loaded.config.stage_model(&loaded.folder, index))
        .collect();
    plan::device_memory(&loaded.config, &models?, 1).map(drop).unwrap_or_default();
    Ok(())
}

fn lines(maker: &mut Maker) {
    let folder = maker.aside("lines");
    let words = &[
        "\"text\"",
        "\"messages\"",
        "\"role\"",
        "\"user\"",
        "\"content\"",
        "[{\"role\":\"user\",\"content\":\"x\"}]",
    ];
    let corpus = Corpus::new(Format::JsonLines, seeds::lines(), words);
    maker.add("lines", folder.join("set.jsonl"), corpus, MIB, |path| {
        let set = |schema, chat| SetConfig {
            file: String::new(),
            schema,
            fields: FieldMap::default(),
            chat,
            plain_text_bytes: 0,
            rejected_from_previous_line: false,
            split: None,
        };
        let schemas = [
            set(Schema::Text, false),
            set(Schema::Messages, true),
            set(Schema::Preferences, true),
            set(Schema::Prompts, false),
            SetConfig { plain_text_bytes: 8, ..set(Schema::Text, false) },
        ];
        let faults: Vec<anyhow::Error> =
            schemas.iter().filter_map(|set| check_set(path, set).err()).collect();
        let named = |fault: &&anyhow::Error| fault.downcast_ref::<Fault>().is_none();
        assert_eq!(faults.iter().find(named).map(|fault| format!("{fault:#}")), None);
        faults.into_iter().next().map_or(Ok(()), Err)
    });
}
