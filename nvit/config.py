"""Configs of the library calls: name = TOML key = flag, annotation = help text."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

from tyro.conf import arg

from .criteria.registry import CRITERIA, automatic, refusal
from .spec import BUNDLE_SIZES, KINDS, TOKENS
from .tasks.registry import TASKS
from .utils import html
from .utils.settings import check_choices

CriterionName = Literal[tuple(CRITERIA)]
KindName = Literal[KINDS]
OnlyName = Literal[(*KINDS, "widths", TOKENS)]

SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Latency targets of a sweep."""


def _help(text: str, **kwargs):
    return arg(help=text, **kwargs)


TaskName = Annotated[
    Literal[("auto", *TASKS)],
    _help("what the model is for: labels, loss, metric; auto: as its head or config tells, else it is asked for"),
]


FeaturesName = Annotated[
    Literal["auto", "class", "pooled", "tokens"],
    _help(
        "of a tower without a classifier, what is to stay as it is: its class token, the mean of its patches, all "
        "tokens; auto: what it hands out"
    ),
]


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingConfig:
    """How weights are trained, in pruning as in finetuning: the published recipe unless said otherwise."""

    task: TaskName = "auto"
    features: FeaturesName = "auto"
    batch_size: Annotated[int, _help("images a step, of all ranks together")] = 64
    optimizer: Annotated[str, _help("as timm's create_optimizer_v2 names it")] = "adamw"
    weight_decay: Annotated[float, _help("not applied to biases and norms")] = 0.05
    grad_clip: Annotated[float, _help("largest gradient norm; 0 for none")] = 0.0
    amp: Annotated[Literal["no", "bf16", "fp16"], _help("mixed precision")] = "no"
    train_mode: Annotated[bool, _help("dropout and drop path while training (the published runs have neither)")] = False
    distill_weight: Annotated[float, _help("alpha of L = alpha L_full + L_CNN; 0 needs no unpruned teacher")] = 100.0
    distill_tau: Annotated[float, _help("temperature of L_full")] = 3.0
    cnn_teacher: Annotated[str, _help("a timm model for hard labels, as regnety_160.deit_in1k; none if empty")] = ""
    cnn_weight: Annotated[float, _help("share of the CNN teacher's labels in L_CNN, the rest is the true label's")] = (
        0.5
    )
    label_smoothing: Annotated[float, _help("of the true labels")] = 0.0
    auto_augment: Annotated[str, _help("timm policy, as rand-m9-mstd0.5-inc1; none if empty")] = ""
    color_jitter: Annotated[float, _help("strength")] = 0.0
    erasing: Annotated[float, _help("probability of random erasing")] = 0.0
    mixup: Annotated[float, _help("mixup alpha")] = 0.0
    cutmix: Annotated[float, _help("cutmix alpha")] = 0.0
    repeats: Annotated[int, _help("times an image comes in an epoch, each augmented anew")] = 1
    ema: Annotated[float, _help("decay of the weights' moving average; 0 for none")] = 0.0
    fsdp: Annotated[
        bool, _help("under torchrun: weights, gradients, optimiser state in shards over the ranks, not a copy on each")
    ] = False
    graphs: Annotated[bool, _help("on CUDA, replay training steps as graphs, captured once per decision")] = True
    seed: Annotated[int, _help("of data order, augmentation and drawn labels")] = 0
    save_every: Annotated[float, _help("seconds between run states on disk")] = 300.0

    def __repr__(self) -> str:
        """What differs from the defaults, as the call that makes it."""
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._changed())
        return f"{type(self).__name__}({said})"

    def _repr_html_(self) -> str:
        changed, hints = self._changed(), get_type_hints(type(self), include_extras=True)
        rows = [(f.name, getattr(self, f.name), hints[f.name].__metadata__[0].help) for f in dataclasses.fields(self)]
        own, others = ([r for r in rows if (r[0] in changed) == mine] for mine in (True, False))
        head = (type(self).__name__, "value", "meaning")
        return (html.table(head, own) if own else "") + html.folded("defaults", html.table(head, others))

    def _changed(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneConfig(TrainingConfig):
    """Prune a vision transformer to one or several latency targets.

    >>> config = nvit.PruneConfig(latency_target=0.8, train=False)
    >>> config
    PruneConfig(latency_target=(0.8,), train=False)
    >>> config.saliency, config.bundle_sizes["mlp"]
    ('curvature', 16)
    """

    latency_target: Annotated[
        tuple[float, ...],
        _help("fractions of the dense latency, in (0, 1); a snapshot at each; in Python also a float"),
    ] = (0.5,)
    sweep: Annotated[
        bool,
        _help("in place of latency_target: 0.9, 0.8 down to 0.4 in one run; --no-train scores units once"),
    ] = False
    criterion: Annotated[
        Literal["auto"] | CriterionName,
        _help(
            "what saliency is; auto: hessian while training, curvature with --no-train (fisher under --budget or "
            "torchrun), remaining with --refit"
        ),
    ] = "auto"
    train: Annotated[bool, _help("train between decisions; --no-train scores frozen weights and decides once")] = True
    lr: Annotated[float, _help("while pruning, at batch 512, scaled linearly")] = 1e-4
    interval: Annotated[int, _help("steps between two decisions")] = 100
    bundles_per_step: Annotated[int, _help("bundles removed at a decision")] = 2
    latency_weight: Annotated[
        float, _help("eta in `score = saliency - eta * latency saved`, loss² per dense latency (training only)")
    ] = 4.85e-4
    momentum: Annotated[float, _help("of the saliency's running mean, while training")] = 0.9
    measure_seconds: Annotated[
        float,
        _help("to measure a compact model where a target is met, and correct the aim; 0: the table's word counts"),
    ] = 5.0
    images: Annotated[
        int, _help("calibration images with --no-train, spread over the classes; 0 for one pass over the data")
    ] = 512
    score_batches: Annotated[int, _help("calibration in batches as training gives them, in place of --images")] = 0
    refit: Annotated[
        bool, _help("with --no-train: rotate queries, keys and values first, refit in closed form what is left")
    ] = False
    cost: Annotated[
        Literal["auto", "predicted", "measured", "both"],
        _help(
            "with --refit, what the units of a group cost: as its scores predict, in half of the time; as measured at "
            "a few depths of each group alone (auto with tokens); both (auto without): of the choices by either and "
            "by the mean of them the one nearest to the dense model on held-back images"
        ),
    ] = "auto"
    depth: Annotated[
        bool,
        _help(
            "with --refit: attention or MLP of a block may leave whole, its mean output stays as a bias, where that is "
            "nearer than widths alone"
        ),
    ] = False
    polish: Annotated[
        int,
        _help(
            "with --refit: so many steps towards the unpruned model's features afterwards, on the calibration images, "
            "without labels; 0 for none"
        ),
    ] = 0
    coarse: Annotated[
        float,
        _help(
            "with --refit: this share of the calibration images is seen through fewer pixels, down to 2 of 7 a side, "
            "so that what is left also answers images less sharp; 0 for none; -1: half of them with tokens, else none"
        ),
    ] = -1.0
    keep_output: Annotated[
        bool, _help("with --refit, of a tower: prune the width of its output too; a linear layer restores it")
    ] = False
    rounds: Annotated[int, _help("with --no-train: score and prune in so many equal steps of latency")] = 1
    labels: Annotated[
        Literal["true", "sampled"], _help("one-shot scores use the data's labels or ones drawn from the model")
    ] = "true"
    budget: Annotated[
        str, _help("memory that --no-train may take, as 8GB: resident on a CPU, allocated on CUDA; no limit if empty")
    ] = ""
    only: Annotated[
        tuple[OnlyName, ...],
        _help(
            "kinds to prune; all five widths if empty. `tokens`, with --no-train, merges alike ones as well: alone, "
            "with `widths` (all five) or with some of them; else none merge"
        ),
    ] = ()
    freeze: Annotated[tuple[str, ...], _help("groups to leave alone, as 'blocks.0.*'; or tokens")] = ()
    stages: Annotated[
        tuple[int, ...], _help("stages of a hierarchical model to prune, from 0, as 2 for Swin's longest; all if empty")
    ] = ()
    bundle_emb: Annotated[int, _help("channels of the stream that leave together")] = BUNDLE_SIZES["emb"]
    bundle_heads: Annotated[int, _help("heads that leave together")] = BUNDLE_SIZES["heads"]
    bundle_qk: Annotated[int, _help("query/key dims that leave together")] = BUNDLE_SIZES["qk_dim"]
    bundle_v: Annotated[int, _help("value dims that leave together")] = BUNDLE_SIZES["v_dim"]
    bundle_mlp: Annotated[int, _help("hidden units that leave together")] = BUNDLE_SIZES["mlp"]
    finetune_epochs: Annotated[float, _help("epochs of finetuning of each snapshot; 0 for none")] = 0.0
    finetune_lr: Annotated[float, _help("at batch 512, scaled linearly, cosine to min_lr")] = 2e-4
    min_lr: Annotated[float, _help("where the finetuning schedule ends, whatever the batch")] = 1e-5
    finetune_tau: Annotated[float, _help("temperature of L_full while finetuning")] = 20.0

    def __post_init__(self) -> None:
        if isinstance(self.latency_target, (int, float)):
            object.__setattr__(self, "latency_target", (float(self.latency_target),))
        if self.sweep and self.latency_target == PruneConfig.latency_target:
            object.__setattr__(self, "latency_target", SWEEP)

    def check(self) -> None:
        """Raise ValueError where a value makes no sense; `prune` and `Pruner` do so before anything else."""
        check_choices(self)
        if not self.latency_target:
            raise ValueError("latency_target is empty; give at least one fraction, as 0.5")
        for t in self.latency_target:
            if not 0 < t < 1:
                raise ValueError(f"latency_target {t:g} is not in (0, 1); it is a fraction of the dense latency")
        if self.sweep and self.latency_target != SWEEP:
            asked = ", ".join(f"{t:g}" for t in self.latency_target)
            raise ValueError(f"sweep stands in place of latency_target, which is {asked}; give one of them")
        if self.sweep and self.rounds > 1:
            raise ValueError(f"sweep scores units once, so rounds {self.rounds} would change nothing; give one of them")
        if self.refit and self.train:
            raise ValueError("refit is for pruning without training; add --no-train (train = false)")
        if self.depth and self.cost == "predicted":
            raise ValueError("depth is priced by what was measured; leave out --cost predicted")
        if self.coarse != -1 and not 0 <= self.coarse <= 1:
            raise ValueError(f"coarse is {self.coarse:g}; it is a share of the calibration images, in [0, 1], or -1")
        for asked, why, instead in (
            (self.depth, "depth leaves the mean output of what has left, which a refit finds", "leave it out"),
            (self.coarse > 0, f"coarse {self.coarse:g} is of the images that a refit sees", "leave it out"),
            (self.polish, f"polish {self.polish} follows a refit", "finetune the snapshot (--finetune-epochs)"),
            (self.cost in ("measured", "both"), f"cost {self.cost} is that of a refitted model", "leave it out"),
        ):
            if asked and not self.refit:
                raise ValueError(f"{why}; add --refit with --no-train (refit = true), or {instead}")
        if self.budget and self.refit:
            raise ValueError(
                f"budget {self.budget} does not bound a refit, which holds activations of all blocks in turn; "
                "leave out --budget or --refit"
            )
        if self.merges_tokens:
            self._check_tokens()
        if (no := refusal(self.saliency, train=self.train, budget=self.budget)) is not None:
            raise ValueError(no)
        if self.budget and (self.train or self.finetune_epochs):
            raise ValueError(
                f"budget {self.budget} holds scoring and pruning only; give --no-train and no --finetune-epochs, and "
                "train the snapshot afterwards with nvit finetune"
            )
        positive = ("batch_size", "interval", "bundles_per_step", "rounds", "repeats")
        for name in (*positive, "bundle_emb", "bundle_heads", "bundle_qk", "bundle_v", "bundle_mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        nothing = (("images", "all images"), ("score_batches", "as many as --images says"), ("polish", "none"))
        for name, none in nothing:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, or 0 for {none}")
        if not 0 <= self.measure_seconds < math.inf:
            raise ValueError(f"measure_seconds is {self.measure_seconds:g}; it must be at least 0")

    def _check_tokens(self) -> None:
        """Raise ValueError where something else that is asked for forbids that tokens merge."""
        if self.train:
            raise ValueError(
                "only tokens: how many merge is chosen without training; add --no-train (train = false), and train the "
                "snapshot with nvit finetune"
            )
        if self.budget:
            raise ValueError(f"budget {self.budget} does not bound the choice of tokens; leave out one of them")
        if self.depth:
            raise ValueError("depth: attention that has left has no keys for tokens to merge by; leave out one of them")
        if self.rounds > 1:
            raise ValueError(
                f"rounds {self.rounds}: with tokens, widths are pruned in steps of their own; leave out --rounds"
            )

    @property
    def merges_tokens(self) -> bool:
        """Whether a run lets tokens merge, see `prune.joint`."""
        return TOKENS in self.only and not any(fnmatch.fnmatch(TOKENS, pattern) for pattern in self.freeze)

    @property
    def width_kinds(self) -> tuple[str, ...]:
        """The kinds of widths that a run prunes."""
        every = not self.only or "widths" in self.only
        return KINDS if every else tuple(kind for kind in KINDS if kind in self.only)

    @property
    def saliency(self) -> str:
        """The criterion of a run in one process, chosen where it is `auto`; see `criteria.registry.automatic`."""
        if self.criterion != "auto":
            return self.criterion
        return automatic(train=self.train, refit=self.refit, budget=bool(self.budget))

    @property
    def measures_costs(self) -> bool:
        """Whether a run measures what groups cost, see `refit.costs`."""
        return self.refit and self.cost != "predicted"

    @property
    def reads_labels(self) -> bool:
        """Whether a run reads the labels of its images."""
        scored = self.labels == "true" and CRITERIA[self.saliency].capabilities.labels
        return self.train or bool(self.finetune_epochs) or scored

    def over_ranks(self, ranks: int) -> PruneConfig:
        """This config as so many processes can follow it: a criterion that is `auto` is one that they can share.

        Raises:
            ValueError: it asks for what runs in one process.
        """
        if ranks == 1:
            return self
        if self.refit or self.merges_tokens:
            raise ValueError(
                f"{'a refit' if self.refit else 'merging tokens'} runs in one process; start without torchrun"
            )
        if self.budget:
            raise ValueError("a budget bounds a run of one process; leave out --budget, or start without torchrun")
        name = self.criterion if self.criterion != "auto" else automatic(train=self.train, ranks=ranks)
        if (no := refusal(name, ranks=ranks)) is not None:
            raise ValueError(no)
        return self if name == self.saliency else dataclasses.replace(self, criterion=name)

    @property
    def bundle_sizes(self) -> dict[str, int]:
        """Units that leave together, by kind."""
        sizes = (self.bundle_emb, self.bundle_heads, self.bundle_qk, self.bundle_v, self.bundle_mlp)
        return dict(zip(KINDS, sizes, strict=True))

    def finetuning(self) -> FinetuneConfig:
        """The finetuning part of this recipe."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainingConfig)}
        shared |= {"epochs": self.finetune_epochs, "lr": self.finetune_lr, "min_lr": self.min_lr}
        return FinetuneConfig(**(shared | {"distill_tau": self.finetune_tau}))


@dataclass(frozen=True, kw_only=True, repr=False)
class FinetuneConfig(TrainingConfig):
    """Train a compact model with the same objective.

    >>> nvit.FinetuneConfig(epochs=30, mixup=0.8)
    FinetuneConfig(mixup=0.8, epochs=30)
    >>> nvit.PruneConfig(finetune_epochs=3, seed=1).finetuning()
    FinetuneConfig(seed=1, epochs=3)
    """

    epochs: Annotated[float, _help("passes over the data")] = 300.0
    lr: Annotated[float, _help("at batch 512, scaled linearly")] = 2e-4
    min_lr: Annotated[float, _help("where the cosine ends, whatever the batch")] = 1e-5
    warmup_epochs: Annotated[float, _help("of linear warm-up")] = 0.0
    warmup_lr: Annotated[float, _help("where the warm-up begins, whatever the batch")] = 1e-6
    distill_tau: Annotated[float, _help("temperature of L_full")] = 20.0
