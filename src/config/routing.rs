//! How a stage balances what experts and devices get, and what it drops where a device gets too much.
//!
//! A device is a group of experts that routing is limited to (`n_group`, `topk_group`), whether or not there is a machine
//! behind each. Rules are in `validate_routing`.

use super::ModelConfig;
use super::model::TopkMethod;
use super::stage::StageKind;
use serde::{Deserialize, Serialize};

/// `balance`: weights of DeepSeek-V2's balance losses (section 2.2.3), which are added to the loss, summed over layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalanceConfig {
    /// α1: even use of experts. Absent: the model's `aux_loss_alpha`. The paper: 0.003.
    pub expert: Option<f64>,
    /// α2: even use of devices. The paper: 0.05.
    pub device: f64,
    /// α3: even numbers of tokens that devices receive. The paper: 0.02.
    pub communication: f64,
}

/// Weights of the balance losses of a stage; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// α1.
    pub expert: f64,
    /// α2.
    pub device: f64,
    /// α3.
    pub communication: f64,
}

impl Balance {
    /// No balance loss.
    pub const NONE: Balance = Balance { expert: 0.0, device: 0.0, communication: 0.0 };

    /// The expert-level loss alone.
    pub fn of_experts(expert: f64) -> Balance {
        Balance { expert, ..Balance::NONE }
    }
}

impl StageKind {
    /// The balance losses of a stage that trains `model`. Reward models and GRPO have none: there the objective alone
    /// moves the router.
    pub fn balance(&self, model: &ModelConfig) -> Balance {
        let config = match self {
            StageKind::Pretrain(stage) => &stage.balance,
            StageKind::LongContext(stage) => &stage.balance,
            StageKind::Sft(stage) => &stage.balance,
            StageKind::RewardModel(_) | StageKind::Grpo(_) => return Balance::NONE,
        };
        Balance {
            expert: config.expert.unwrap_or(model.aux_loss_alpha),
            device: config.device,
            communication: config.communication,
        }
    }

    /// The capacity factor of a stage that drops tokens.
    pub fn capacity_factor(&self) -> Option<f64> {
        match self {
            StageKind::Pretrain(stage) => stage.capacity_factor,
            StageKind::LongContext(stage) => stage.capacity_factor,
            StageKind::Sft(_) | StageKind::RewardModel(_) | StageKind::Grpo(_) => None,
        }
    }
}

impl ModelConfig {
    /// Groups of experts that routing is limited to, D; 1 where it is not limited.
    pub fn device_count(&self) -> usize {
        match self.topk_method {
            TopkMethod::GroupLimitedGreedy if self.n_routed_experts > 0 => self.n_group,
            _ => 1,
        }
    }
}
