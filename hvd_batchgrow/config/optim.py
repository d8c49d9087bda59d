"""`[optim]`: one model per optimizer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field

from hvd_batchgrow.config.types import Fraction, NamePattern, PositiveFloat, Section, tuples


class GroupSection(Section):
    """An entry of `optim.groups`: some parameters, and how the optimizer treats them."""

    match: NamePattern
    """Pattern of parameter names, as `nn.name_patterns` matches it."""
    lr_scale: PositiveFloat = 1.0
    """Learning rate of these parameters, divided by the schedule's."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of these parameters. None: `optim.weight_decay`."""
    decay_norm_and_bias: bool | None = None
    """Whether it applies to normalization parameters and biases too. None: `optim.decay_norm_and_bias`."""

    @property
    def is_plain(self) -> bool:
        """Whether its parameters are treated like those that no entry matches."""
        return self.lr_scale == 1 and self.weight_decay is None and self.decay_norm_and_bias is None

    def describe(self) -> str:
        """Return the pattern and what differs for its parameters."""
        decay = "" if self.weight_decay is None else f", weight decay {self.weight_decay:g}"
        others = {None: "", True: ", norms and biases decay too", False: ", norms and biases do not decay"}
        return f"{self.match}: lr × {self.lr_scale:g}{decay}{others[self.decay_norm_and_bias]}"


class OptimBase(Section):
    """`[optim]`: the keys that all optimizers share."""

    name: str
    lr: PositiveFloat
    """Learning rate ε at the start of the schedule, after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; `decay_norm_and_bias` says which parameters it applies to."""
    weight_decay_rule: Literal["per_update", "per_epoch"] = "per_update"
    """Constant when the phase changes: per_update: λ; per_epoch: the fraction of a weight that decay removes per epoch
    (λ changes; an error with adam and lars)."""
    decay_norm_and_bias: bool = False
    """true: weight decay also applies to normalization parameters and biases (fewer than two dimensions), as in torch's
    optimizers. false: only to weights with two or more dimensions."""
    groups: Annotated[tuple[GroupSection, ...], BeforeValidator(tuples)] = ()
    """Parameters with their own learning rate or weight decay; the first entry that matches a parameter applies."""
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """d: each layer's learning rate is d times that of the layer above it. None: all layers have the same."""

    averages_gradients: ClassVar[bool] = False
    """Whether the step is an average of gradients, whose size the momentum does not change; otherwise a sum."""

    def describe_groups(self) -> list[str]:
        """Return a line for each entry of `groups`, and one for `layer_decay`; the network is not known here."""
        lines = [f"optim.groups: {group.describe()}" for group in self.groups]
        if self.layer_decay:
            lines.append(f"optim.layer_decay: lr × {self.layer_decay:g} from each layer to the one below it")
        return lines

    @property
    def momentum_key(self) -> str:
        """The key that holds the momentum."""
        return "optim.momentum"

    def starting_at(self, lr: float, momentum: float) -> Self:
        """Return a copy whose schedule starts at this learning rate and momentum."""
        return self.model_copy(update={"lr": lr, "momentum": momentum})


class SgdSection(OptimBase):
    """`[optim]`, name = "sgd": stochastic gradient descent with momentum, in torch's form."""

    name: Literal["sgd"]
    momentum: Fraction = 0.9
    """m of u = m u + g, w −= ε u."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    rescale_momentum: bool = False
    """If the momentum changes from m to m': scale its buffer by (1-m)/(1-m') (true), or let it refill (false)."""

    def starting_at(self, lr: float, momentum: float) -> Self:
        """Return a copy whose schedule starts at this learning rate and momentum; nesterov needs momentum."""
        changes = {"lr": lr, "momentum": momentum, "nesterov": self.nesterov and momentum > 0}
        return self.model_copy(update=changes)


class AdamSection(OptimBase):
    """`[optim]`, name = "adam", or "adamw" with decoupled weight decay."""

    name: Literal["adam", "adamw"]
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(tuples)] = (0.9, 0.999)
    """[β₁, β₂]: decay rates, per update, of the moving averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of the step."""

    averages_gradients: ClassVar[bool] = True

    @property
    def momentum(self) -> float:
        """β₁, in the place of the momentum: a schedule may change it. It does not change the noise scale."""
        return self.betas[0]

    @property
    def momentum_key(self) -> str:
        """The key that holds the momentum."""
        return "optim.betas[0]"

    def starting_at(self, lr: float, momentum: float) -> Self:
        """Return a copy whose schedule starts at this learning rate and momentum."""
        return self.model_copy(update={"lr": lr, "betas": (momentum, self.betas[1])})


class LarsSection(OptimBase):
    """`[optim]`, name = "lars": SGD with momentum, where the step of each tensor is scaled by its trust ratio."""

    name: Literal["lars"]
    momentum: Fraction = 0.9
    """m of v = m v + ε λ (g + β w), w −= v."""
    trust_coefficient: PositiveFloat = 0.001
    """η: the change of a weight at a learning rate of 1, as a fraction of the weight's norm."""
    eps: Annotated[float, Field(ge=0)] = 0.0
    """Added to the denominator of the trust ratio."""
    rescale_momentum: bool = False
    """If the momentum changes from m to m': scale its buffer by (1-m)/(1-m') (true), or let it refill (false)."""


OptimSection = Annotated[SgdSection | AdamSection | LarsSection, Field(discriminator="name")]
