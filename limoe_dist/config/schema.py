"""Every setting of a run, typed and frozen. What LIMoE's paper leaves open is a field here, with its source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    # JSON has no infinity: it would be written as null, and run.json could not be read again.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    width: Count = 384
    """Width D of every token, in both modalities."""
    depth: Count = 12
    """Number of transformer blocks; blocks are numbered from 0."""
    heads: Count = 6
    """Attention heads; divides width."""
    mlp_dim: Count = 1536
    """Hidden width F of a dense MLP and of every expert."""
    embed_dim: Count = 384
    """Width P of the two embeddings that the contrastive loss compares."""
    towers: Literal["one", "two"] = "one"
    """one: all tokens pass through the same blocks, as in LIMoE. two: captions have blocks of their own, as many and as
    wide, with moe.blocks empty: the dense two-tower baseline of Table 2."""
    init_temperature: Positive = 0.1
    """First value of the learned temperature T; logits are cosine / T. big_vision and LiT start at 0.1."""


class Image(Section):
    size: Count = 224
    """Side of the square picture that the model sees, in pixels."""
    patch: Count = 32
    """Side of a patch, in pixels; divides image.size."""
    mean: float = 127.5
    """Subtracted from 0..255 pixel values; 255 maps a white background to 0."""
    std: Positive = 127.5
    """Divides the pixel values after image.mean was subtracted."""
    min_crop_area: Share = 1.0
    """Smallest share of the picture that a random square-ish crop keeps; 1 keeps the whole picture."""
    flip: Fraction = 0.0
    """Probability of a horizontal flip."""
    rotate_degrees: NotNegative = 0.0
    """Rotation is uniform in plus or minus this angle; uncovered pixels are white."""
    scale: Fraction = 0.0
    """Zoom is log-uniform in [1 / (1 + scale), 1 + scale]."""
    translate: Fraction = 0.0
    """Shift is uniform in plus or minus this share of the side, in each direction."""
    brightness: Fraction = 0.0
    """Brightness factor is uniform in 1 plus or minus this."""
    contrast: Fraction = 0.0
    """Contrast factor is uniform in 1 plus or minus this."""
    saturation: Fraction = 0.0
    """Saturation factor is uniform in 1 plus or minus this."""
    hue_degrees: NotNegative = 0.0
    """Hue rotation is uniform in plus or minus this angle."""


class Text(Section):
    length: Count = 16
    """Tokens of a caption; longer captions are cut (LIMoE, section 4.1: 16)."""
    vocab_size: Count = 32_000
    """Rows of the token embedding; the SentencePiece vocabulary may be smaller, never larger."""
    pad: Literal["token", "masked"] = "token"
    """token: padding is an ordinary token, attended, routed and pooled, as in big_vision.
    masked: attention, routing, losses and pooling pass over it."""


class Moe(Section):
    blocks: tuple[CountOrZero, ...] = (1, 3, 5, 7, 9, 11)
    """Blocks (from 0) whose MLP is a mixture of experts; empty for a dense model."""
    num_experts: Count = 32
    """Experts E of each MoE block."""
    top_k: Count = 1
    """Experts K that each token chooses."""
    group_pairs: Count = 32
    """Pairs whose tokens are routed together: all their image tokens, then all their text tokens.
    Fixed, so that results do not depend on the layout."""
    capacity_factor: Positive = 1.05
    """Slots of an expert in a group = ceil(tokens * K * factor / E), rounded up to capacity_multiple."""
    capacity_multiple: Count = 4
    """V-MoE rounds the capacity up to a multiple of 4."""
    eval_capacity: Literal["full", "paper"] = "full"
    """full: in evaluation nothing is dropped, so that an embedding depends on its own input only.
    paper: slots are limited in evaluation too, by moe.eval_capacity_factor."""
    eval_capacity_factor: NotNegative = 0.0
    """With moe.eval_capacity=paper: the factor in evaluation; 0: moe.capacity_factor."""
    order: Literal["priority", "images_first", "text_first", "random"] = "priority"
    """Who gets a slot first: tokens with the largest gate (batch priority routing, LIMoE section 2.2.3), or the
    baselines of Figure 6: one modality before the other, each as it stands in the group, or a random order."""
    priority: Literal["max", "sum"] = "max"
    """moe.order=priority goes by the largest gate of a token, or by the sum of its K gates (V-MoE)."""
    routers: Literal["shared", "per_modality"] = "shared"
    """One router for both modalities, or one for each (LIMoE, appendix E.3)."""
    image_experts: CountOrZero = 0
    """0: every expert serves both modalities. Else the first so many experts serve images alone, the others texts
    (separate pools, LIMoE, appendix E.3)."""
    noise_std: NotNegative = 1.0
    """Router noise in training is normal with standard deviation noise_std / E (V-MoE)."""
    aux_weight: NotNegative = 0.04
    """Weight of the auxiliary losses: aux_weight * mean over the active losses, summed over MoE blocks."""
    importance: NotNegative = 1.0
    """Relative weight of the importance loss; 0 switches it off."""
    load: NotNegative = 0.0
    """Relative weight of the load loss; needs noise."""
    z: NotNegative = 1.0
    """Relative weight of the router z-loss."""
    local_image: NotNegative = 0.0
    """Relative weight of the local entropy loss of images."""
    local_text: NotNegative = 1.0
    """Relative weight of the local entropy loss of texts."""
    global_image: NotNegative = 1.0
    """Relative weight of the thresholded global entropy loss of images."""
    global_text: NotNegative = 1.0
    """Relative weight of the thresholded global entropy loss of texts."""
    mutual_information: NotNegative = 0.0
    """Relative weight of minus the mutual information of experts and modalities (LIMoE, sections 2.2.2 and 4.1)."""
    modality_prior: Literal["tokens", "uniform"] = "tokens"
    """For moe.mutual_information: a modality weighs as many tokens as it has, or one half. The paper leaves it open."""
    local_form: Literal["plain", "above_log_k", "merged"] = "plain"
    """Local entropy with K > 1, which the paper modifies in its appendix E.1: plain: as with K = 1; above_log_k: only
    what exceeds log K; merged: after the K largest gates were put together."""
    min_image_experts: Positive = 20.0
    """The global image loss asks for at least exp(threshold) = this many experts."""
    min_text_experts: Positive = 9.0
    """The global text loss asks for at least exp(threshold) = this many experts."""
    kept_experts: tuple[str, ...] = ()
    """What `limoe prune` writes: for each MoE block the experts that are left, by their number before, as "0 4 7".
    The router keeps all columns: gates stay as they were. Empty: all experts."""


class Data(Section):
    manifest: str = ""
    """manifest.json of the training shards (`limoe prep pack` writes it), a path or a URL such as
    s3://bucket/web/manifest.json. With data.mixture: the one of its manifests whose tokenizer is used; empty: the
    first."""
    mixture: tuple[str, ...] = ()
    """Several training manifests with their shares of the samples, each MANIFEST=WEIGHT, as in web/manifest.json=3
    classes/manifest.json=1; a weight is a number such as 3, 0.25 or 1/4. Empty: data.manifest alone."""
    validation: str = ""
    """manifest.json of shards that are never trained on, for evaluation during training."""
    tokenizer: str = ""
    """SentencePiece .model; empty: the one that the training manifest names."""
    window_rows: CountOrZero = 262_144
    """Rows of a source that are mixed with one another: an epoch goes through its shards in a random order, and through
    the rows of so many of them at a time in a random order. Fewer: fewer shards are open, and cached, at once, and a
    batch is from fewer shards. A smaller source, and with 0 every source, is mixed as a whole."""
    block_shards: Count = 1
    """Neighbouring shards that stay together in that order."""
    check: Literal["start", "never"] = "start"
    """start: compare the checksums of all local shards before the first step. never: only their sizes, for sets that
    `limoe prep verify` has read. Shards from a URL are always compared when they arrive."""
    cache: str = ""
    """Folder of this host for shards from a URL, shared by its ranks; empty: limoe-shards-UID in the folder for
    temporary files (TMPDIR)."""
    cache_gb: Positive = 100.0
    """Most gigabytes in that folder; at least the shards of two windows of each such source."""
    threads: Count = 1
    """Decoder threads of each rank."""
    prefetch: Count = 2
    """Batches prepared ahead of the training step."""
    max_bad_frac: Fraction = 0.01
    """The run stops when more than this share of the rows read so far (and at least 16) could not be decoded."""


class Optim(Section):
    name: Literal["adamw", "adafactor"] = "adamw"
    """adafactor: big_vision's, with factored second moments and a full first one, as the paper's group trains."""
    engine: Literal["native", "deepspeed"] = "native"
    """Who sums gradients and keeps the optimizer's state: this project's ZeRO-1, or DeepSpeed (with tp=1 and adamw)."""
    zero_stage: Literal[1, 2] = 1
    """ZeRO stage: 1 cuts the optimizer's state over the replicas; 2, with optim.engine=deepspeed, gradients too."""
    offload: bool = False
    """Keep the optimizer's state in the CPU's memory; with optim.engine=deepspeed."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.98
    """adamw: decay of the second moment."""
    eps: Positive = 1e-8
    """adamw: added to the root of the second moment."""
    decay_exponent: Positive = 0.8
    """adafactor: the second moment's decay at step t, from 0, is min(max_decay, 1 - (t + 1) ** -decay_exponent)."""
    max_decay: BelowOne = 0.999
    """adafactor: the largest decay of the second moment."""
    min_factored_dim: Count = 32
    """adafactor: a matrix is factored where both of its dims are at least this long."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay of kernels (matrices), times the learning rate; biases, norms, tables and positions have none."""
    clip_norm: Positive = 1.0
    """Largest global gradient norm."""
    warmup_steps: CountOrZero = 10_000
    """Steps of linear warm-up."""
    timescale: Count = 10_000
    """After the warm-up the rate is lr / sqrt(1 + (step - warmup_steps) / timescale)."""
    cooldown_steps: CountOrZero = 10_000
    """Last steps, over which the rate goes linearly to 0."""


class Parallel(Section):
    tp: Count = 1
    """Ranks that share one attention and dense MLP (tensor parallel)."""
    ep: Count = 1
    """Ranks that share one set of experts (expert parallel); divides moe.num_experts."""
    reduce_dtype: Literal["fp32", "fp64"] = "fp32"
    """Type in which gradients are summed over ranks; with train.dtype fp64 always fp64."""
    bucket_mb: Positive = 64.0
    """Gradients are summed in buckets of about this many megabytes, in a fixed order."""
    overlap: bool = True
    """Sum the buckets that are full while the backward pass goes on."""
    kernels: Literal["auto", "torch", "apex"] = "auto"
    """Fused optimizer and layer norm. auto: NVIDIA's apex on a GPU where it is installed, else torch's."""
    start_timeout_s: Positive = 300.0
    """Seconds in which all ranks must have come at the start; those that have not are named."""
    timeout_s: Positive = 600.0
    """Seconds after which a collective that some rank did not join ends the run."""
    threads: Count = 1
    """CPU threads of a rank for arithmetic."""


class Train(Section):
    steps: Count = 100_000
    """Optimizer steps of the whole run."""
    batch_pairs: Count = 8192
    """Pairs of the global batch, over all ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial values, router noise, data order and augmentation."""
    dtype: Literal["auto", "fp32", "fp64", "bf16"] = "auto"
    """Weights and arithmetic of the blocks; router, norms, temperature and losses are at least fp32, and so are the
    optimizer's copies of all weights. auto: bf16 on a GPU, fp32 on a CPU."""
    microbatch_pairs: CountOrZero = 0
    """Pairs of a rank whose activations are kept at once; 0: all of them. The gradient stays that of the whole batch:
    every pair is embedded once more than without. A multiple of moe.group_pairs that divides the pairs of a rank."""
    recompute: bool = False
    """Keep the input of each block alone and compute its activations again in the backward pass."""
    contrastive_chunk: CountOrZero = 0
    """Columns of the contrastive logits that are in memory at once; 0: all (pairs of the rank x batch_pairs)."""
    init_from: str = ""
    """Run, or checkpoint of one, whose weights a new run begins with; empty: first values from the seed."""
    stop_grace_s: Positive = 120.0
    """Seconds that the launcher of `--ranks` waits, after a signal, for the final checkpoint."""


class Eval(Section):
    every_steps: CountOrZero = 0
    """Zero-shot, retrieval and contrastive accuracy on data.validation every so many steps; 0: at the end only."""
    batch_pairs: Count = 64
    """Pictures or texts per rank and forward pass."""
    classes: Literal["evaluated", "trained"] = "evaluated"
    """What zero-shot chooses between without a class file: the concepts of the evaluated rows, or with trained those
    of the training rows too (they are all read for that: for small sets)."""
    templates: tuple[str, ...] = ("{}", "an emoji of {}")
    """Prompts for zero-shot classes; {} is the class name. An entry that is exactly clip stands for CLIP's 80."""
    captions: Literal["first", "all"] = "first"
    """Which captions of a row retrieval asks for and takes as right: its first alone, or all (COCO's protocol)."""
    minibatch: Annotated[int, Field(ge=2)] = 1024
    """Pairs that contrastive accuracy chooses between: LIMoE's validation accuracy (Table 3) takes 1,024."""


class Checkpoint(Section):
    every_steps: CountOrZero = 1000
    """Steps between checkpoints; 0: only by the clock, at the end and on a signal."""
    every_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Minutes after which a checkpoint is due, whatever the steps; 0: steps alone decide."""
    keep: Count = 2
    """Newest checkpoints that are kept; older ones are removed when a newer one is whole and verified."""
    keep_every: CountOrZero = 0
    """Checkpoints of steps that this divides are kept for good; 0: none."""
    read_back: bool = True
    """Read each checkpoint back after it was written and compare its checksums, before an older one is removed."""


class Guard(Section):
    """What a run does about its own numbers. The defaults are this project's: the paper gives none."""

    non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """The loss or the gradient is not finite. skip: leave this batch out; weights, moments and schedule stay as they
    are. rollback: go back to the newest checkpoint, and pass over guard.rollback_batches. stop: end with status 3.
    Whatever is chosen, such a gradient never reaches the weights."""
    spike: Literal["off", "note", "skip", "rollback", "stop"] = "note"
    """The loss is far above the last ones: by guard.spike_z. note: a line in RUN/guard.jsonl, and training goes on."""
    collapse: Literal["off", "note", "rollback", "stop"] = "note"
    """guard.collapse_lines lines of metrics in a row tell of a block where a modality gets too few slots, or where too
    many experts get no token."""
    spike_z: Positive = 8.0
    """Robust z-score from which a loss is a spike: (loss - median) / (1.4826 x median distance from the median)."""
    spike_window: Annotated[int, Field(ge=8, le=4096)] = 128
    """Steps whose losses are compared; judged as soon as a quarter of them, at least 8, are there."""
    min_success: Fraction = 0.3
    """A modality has collapsed where fewer of its tokens than this share get a slot; 0: never."""
    max_dead_frac: Fraction = 0.75
    """A block has collapsed where more of its experts than this share get no token of either modality; 1: never."""
    collapse_lines: Count = 5
    """Lines of metrics, of log.every_steps each."""
    rollback_batches: Count = 16
    """Batches that are passed over after going back: the one that was found, and those before it."""
    max_skips: Count = 16
    """The run stops when so many batches in a row were left out."""
    max_rollbacks: Count = 3
    """The run stops when it would go back to the same checkpoint more often than this."""


class Log(Section):
    every_steps: Count = 10
    """Steps between two lines of metrics.jsonl and TensorBoard; each is the mean over the steps between."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    straggler_factor: Annotated[float, Field(ge=1.0)] = 1.5
    """A rank that works more than so many times as long for a step as the median rank is named."""


class Run(Section):
    """The whole of a run; run.json holds this, and beside it the `environment` of the last start."""

    preset: str = ""
    """The preset that this run was made from."""
    model: Model = Model()
    image: Image = Image()
    text: Text = Text()
    moe: Moe = Moe()
    data: Data = Data()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    log: Log = Log()

    @property
    def image_tokens(self) -> int:
        return (self.image.size // self.image.patch) ** 2
