"""`[schedule]`: the keys that policies share. A file of `schedule/policies/` has a policy's own keys."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from hvd_batchgrow.config.types import Fraction, PositiveFloat, PositiveInt, Section, matching

ShareOfN = Annotated[str, matching("N/[1-9][0-9]{0,17}", 'a fraction of the training set such as "N/10"')]
MaxBatch = PositiveInt | ShareOfN | None
LrRule = Literal["none", "linear", "sqrt", "adam", "adam_linear"]


class ScheduleBase(Section):
    """`[schedule]`: the keys that all policies share, and properties for code that treats all policies alike."""

    if TYPE_CHECKING:
        policy: str  # a field of each policy, after the shared keys
    epochs: PositiveFloat
    """Length of the run, in epochs."""
    lr_scale: PositiveFloat = 1.0
    """Multiply the learning rate at the start by this factor, and the batch by as much as keeps the noise scale: by the
    same factor, with seesaw by its square, and likewise with Adam if lr_rule is sqrt, adam or adam_linear."""
    raise_momentum_to: Fraction | None = None
    """Start with this momentum m' and multiply the batch by (1-m)/(1-m'); the noise scale stays the same. An error with
    adam and adamw, whose noise scale does not depend on β₁."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Length, in epochs, of a linear warm-up of the learning rate. 0: no warm-up."""
    warmup_start_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the start of the warm-up."""
    exact_noise: bool = False
    """Noise scale that follows the schedule. true: ε/(1-m) · (N/B - 1), exact for any B. false: its leading order,
    ε N / (B (1-m)). For Adam without the factor 1/(1-m)."""

    is_adaptive: ClassVar[bool] = False
    """Whether a trigger decides when the batch grows."""
    is_own_twin: ClassVar[bool] = False
    """Whether only the learning rate changes."""
    normalizes_gradients: ClassVar[bool] = False
    """Whether the policy's noise scale is that of normalized gradients; see `NoiseScale`."""

    @property
    @abstractmethod
    def first_batch(self) -> int:
        """B₀ in samples, as written in the job file."""

    @property
    def enlarged_batch(self) -> float:
        """The requested batch of the first update, in samples, before `lr_scale` and `raise_momentum_to`."""
        return self.first_batch

    @property
    def stated_limit(self) -> int | str | None:
        """`max_batch` as written in the job file; None: no limit, or the policy does not have this key."""
        return None

    @property
    def rule(self) -> LrRule:
        """`lr_rule`, which not every policy has."""
        return "none"

    @property
    def stated_unit(self) -> int | None:
        """`batch_multiple` as written in the job file; None: its default, or the policy does not have this key."""
        return None

    def batch_unit(self, ghost_batch: int) -> int:
        """Return the samples of which every batch is a whole multiple."""
        return self.stated_unit or ghost_batch

    def limit(self, num_samples: int, unit: int) -> int | None:
        """Return the largest allowed batch in samples, or None for no limit. "N/10" is rounded down to whole units."""
        if isinstance(stated := self.stated_limit, str):
            return num_samples // int(stated.removeprefix("N/")) // unit * unit
        return stated


class GrowthKeys(ScheduleBase):
    """Keys of policies that grow the batch."""

    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". The learning rate decays instead once it is reached. None: no limit."""
    batch_multiple: PositiveInt | None = None
    """Every batch is a whole multiple of this, so that the ranks can form it. None: of `model.ghost_batch`, or with the
    policies import and adaptive of `global_batch`."""

    @property
    def stated_limit(self) -> int | str | None:
        """`max_batch` as written in the job file; None: no limit."""
        return self.max_batch

    @property
    def stated_unit(self) -> int | None:
        """`batch_multiple` as written in the job file; None: its default."""
        return self.batch_multiple


class LrRuleKeys(ScheduleBase):
    """The key of policies whose learning rate may follow the batch."""

    lr_rule: LrRule = "none"
    """Factor of the learning rate when the batch has grown by κ: none: 1; linear: κ; sqrt: √κ; adam and adam_linear:
    √κ, with new β₁, β₂ and eps."""

    @property
    def rule(self) -> LrRule:
        """`lr_rule` of the job file."""
        return self.lr_rule
