//! Rules of what a stage balances and drops.

use super::document::{ConfigError, Node};
use super::routing::BalanceConfig;
use super::validate_stage::StageRules;

/// Refuses, with the reason, keys that another kind of stage has.
pub fn refuse_elsewhere(node: &Node, path: &str, kind: &str) -> Result<(), ConfigError> {
    let no_drop = "lets full devices drop tokens, which only pretrain and long-context stages do";
    let no_balance = "weighs the balance losses, which reward-model and grpo stages do not have";
    let reasons: &[(&str, &str)] = match kind {
        "sft" => &[("capacity_factor", no_drop)],
        "reward-model" | "grpo" => &[("capacity_factor", no_drop), ("balance", no_balance)],
        _ => &[],
    };
    let found = node.entries().iter().find_map(|entry| {
        let reason = reasons.iter().find(|(key, _)| *key == entry.key)?.1;
        Some((entry, reason))
    });
    match found {
        Some((entry, reason)) => Err(ConfigError {
            place: entry.place.clone(),
            message: format!("{path}.{} {reason}; leave it out of this {kind} stage", entry.key),
        }),
        None => Ok(()),
    }
}

impl StageRules<'_> {
    pub(super) fn balance(&self, balance: &BalanceConfig) -> Result<(), ConfigError> {
        let weights = [
            ("expert", balance.expert.unwrap_or(0.0)),
            ("device", balance.device),
            ("communication", balance.communication),
        ];
        for (name, weight) in weights {
            self.require(weight >= 0.0, &["balance", name], |key| {
                format!("{key} = {weight} must not be negative; 0 turns the loss off")
            })?;
            let devices = name == "expert" || weight == 0.0 || self.has_devices();
            self.require(devices, &["balance", name], |key| {
                format!("{key} = {weight} {NO_DEVICES}")
            })?;
        }
        let experts = self.rules.config.model.n_routed_experts;
        let weight = balance.expert.unwrap_or(0.0);
        self.require(weight == 0.0 || experts > 0, &["balance", "expert"], |key| {
            format!("{key} = {weight} balances experts, and the model has none; leave it out")
        })
    }

    pub(super) fn capacity(&self, factor: Option<f64>) -> Result<(), ConfigError> {
        let Some(factor) = factor else { return Ok(()) };
        self.require(factor > 0.0, &["capacity_factor"], |key| {
            format!("{key} = {factor} must be above 0; leave it out to drop nothing")
        })?;
        self.require(self.has_devices(), &["capacity_factor"], |key| {
            format!("{key} = {factor} {NO_DEVICES}")
        })
    }

    fn has_devices(&self) -> bool {
        self.rules.config.model.device_count() > 1
    }
}

const NO_DEVICES: &str = "is about devices, and the model's routing knows of one only; set model.topk_method = \
                          \"group_limited_greedy\" with model.n_group above 1, or leave it out";
