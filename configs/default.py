"""Every configuration key, with its unit and its allowed values.

The other files of this folder start from here and change only what differs. From the command line any key
can be set with `--config.group.key=value`.

Durations have exactly one suffix: of `x_steps` and `x_epochs` one is above 0, the other is 0. One step is
one optimiser update on one global batch; one epoch is as many steps as show each noisy training example once.
"""

from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import methods


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the configuration with all keys. Argument: `reference=default|authors|paper`."""
    args = config_lib.parse_arguments(arguments, reference="default")
    config = ConfigDict()

    config.seed = 0  # initial weights, order of the examples, augmentation, mixup; noise and split have their own
    config.batch_size = 64  # noisy examples per step, over all devices
    # Groups inside which examples are mixed: batch-norm statistics, logit normalisation, probe resampling and
    # mixup partners. 1 = the whole batch; the number of devices = nothing but gradients crosses devices.
    # batch_size and trusted.batch_size must be multiples of it.
    config.batch_groups = 1
    # Parts of a batch that go through the network one after the other; only one part's activations are in memory, and
    # each is computed once more in the backward pass. Must divide batch_groups; changes nothing but rounding.
    config.microbatches = 1
    # none | balanced: the classes take turns in every batch, the noisy ones by given labels, so that a loss counts
    # N / (K · examples of the class) times on the mean; an audit weighs its final classifier likewise.
    config.class_weight = "none"
    config.eval_batch_size = 256  # test examples per forward pass, over all devices
    config.num_train_steps = 0
    config.num_train_epochs = 10.0  # this key and those marked with † may be -1: from the data (config.resolve)
    # steps | forward_passes: what num_train counts. Of forward_passes it is the length of a plain training, and a
    # method has as many steps as cost the same (docs/methods.md: ieg 3 of 22). Phases of methods keep their lengths.
    config.budget = "steps"
    config.log_every_steps = 50  # training metrics are averages over this many steps
    config.log_every_epochs = 0.0
    config.eval_every_steps = 0
    config.eval_every_epochs = 1.0  # † cycle ends and the last step are evaluated besides
    config.checkpoint_every_steps = 0
    config.checkpoint_every_epochs = 1.0  # †

    config.data = data = ConfigDict()
    # digits | fashion_mnist | cifar10 | cifar100 | webvision | imagenet | food101 | controlled_noisy_web_labels |
    # image_folder | image_csv | records | huggingface | arrays | features; docs/data.md says for each what the other
    # keys mean.
    data.name = "digits"
    data.dir = ""  # folder with the published files, or of TFDS; "" = through TFDS where the data set is there
    data.variant = ""  # which of several versions of the data set, or column of labels; "" = the usual one
    data.train = ""  # arrays, features: the .npz file (or a table); image_folder: folder; image_csv: list
    # image_folder, image_csv: folder or list; huggingface: folder; webvision: "" its own set, or where ImageNet is
    data.test = ""
    data.trusted = ""  # image_folder, image_csv, huggingface: likewise, of checked images; webvision: where ImageNet is
    data.image_size = 0  # † pixels of a side, decoded and resized (area) into memory while loading; 0 = as it comes
    data.num_classes = 0  # K; 0 = as the data say
    data.unreadable = "refuse"  # refuse | skip: images in files that cannot be decoded; they are named either way
    # Hold out this many training examples and evaluate on them, with their clean labels, in place of the test
    # set, which is then not read at all: for choosing settings. 0 = evaluate on the test set.
    data.validation_size = 0
    # Train on this many of the noisy examples that are left, drawn at random, always the same ones. 0 = on all.
    data.train_size = 0
    # Train without this part, 0 to data.folds - 1, of the noisy examples, which are divided at random into data.folds
    # parts, always the same: for predictions of examples that a network has not seen. folds 0 = train on all.
    data.folds = 0
    data.fold = 0
    # float32 | bfloat16 | uint8: as what images of a training batch are sent to the devices, where they become float32
    # again. bfloat16 is half the bytes, rounded to 8 binary digits; uint8 is a quarter, rounded to 256 grey levels, and
    # not for features. Images of an evaluation are float32 always.
    data.transfer = "float32"
    # cleaned.csv of an audit of a run on the same data: train on the examples and labels in it. "" = on those given.
    data.cleaned = ""

    config.noise = noise = ConfigDict()
    # none | uniform | symmetric_flip | asymmetric | asymmetric_contiguous | transition_matrix |
    # instance_dependent | open_set | file | human; ieg_jax/data/noise/kinds.py defines each.
    noise.kind = "none"
    noise.rate = 0.0  # nominal share of examples that are corrupted, in [0, 1]
    noise.selection = "bernoulli"  # which: bernoulli (each by itself) | exact (that many) | exact_per_class
    noise.seed = 0
    noise.file = ""  # file: labels (.json or .npy); human: the .pt file; transition_matrix: K×K (.json or .npy)
    noise.label_set = ""  # human: aggre | random1 | random2 | random3 | worse (CIFAR-10N), noisy (CIFAR-100N)
    noise.open_set = ""  # open_set: sources of the foreign images, name or name:dir, separated by commas

    config.trusted = trusted = ConfigDict()
    # train: taken out of the training set, with clean labels | separate: comes with the data (data.trusted)
    trusted.source = "train"
    trusted.per_class = 10  # images per class (source=train, or a separate set that is a pool to choose from)
    trusted.fraction = 0.0  # above 0: this share of each class instead of per_class, at least 1 of each
    trusted.ids = ""  # file that lists them instead: trusted.json of a run, or one id or image path per line
    # Keep this share of each class of them, rounded down, out of training: they measure accuracy where there is no test
    # set, and ieg_jax.audit calibrates itself on them. In [0, 1).
    trusted.holdout = 0.0
    # True: they are training examples too, with their true labels, but for those that are held out: what methods that
    # need no trusted set (supervised, gce, elr, ...) learn from them. These learn from the noisy examples alone else.
    trusted.join = False
    trusted.seed = 0
    trusted.batch_size = 0  # trusted images per step, each augmented afresh; 0 = batch_size
    trusted.shuffle = False  # True: a new order inside each class at each pass; False: always the same

    config.augment = augment = ConfigDict()
    # Operations of ieg_jax/data/augment.py, in order, separated by |; "" = none.
    augment.standard = "crop(pad=1)"  # the standard view of an image, of a trusted image too
    # The other views, see augment.views_of.
    augment.strong = "affine(rotate=15,shear=0.1,zoom=0.1,translate=0.1)|intensity(0.2)|cutout(0.4)"
    # What the strong views are made from: standard (the standard view) | original (the image itself, as for mixmatch).
    augment.views_of = "standard"
    augment.evaluation = ""  # for measuring accuracy; images of various sizes: resize(256)|center_crop(224)
    augment.num_views = 2  # V: the standard view and V - 1 strong ones; at least 2 where a method needs them

    # A pretrained network that stays as it is: images become its features, which are computed once and kept, and
    # config.model is trained on these, as on those of data.name=features (docs/data.md).
    config.backbone = backbone = ConfigDict()
    backbone.name = ""  # one of the networks of model.name; "" = none, config.model sees the images
    backbone.pretrained = "imagenet"  # its weights, see model.pretrained
    backbone.conventions = "own"  # see model.conventions
    backbone.image_size = 112  # pixels of a side to which the centre square of each image is resized
    # V: features of each training and trusted image and of V - 1 views of it, which backbone.augment makes once. A step
    # draws one of them anew, in place of augmentation. {size} stands for backbone.image_size.
    backbone.views = 1
    backbone.augment = "random_resized_crop({size},smallest=0.5)|flip"
    backbone.cache = ""  # folder of the features, on a bucket too; "" = in the user's cache folder

    config.model = model = ConfigDict()
    # wide_resnet | resnet29_v2 | resnet18, resnet34, preact_resnet18 (of CIFAR) | resnet50 | resnet50_v2 | vgg13
    # | densenet100 | mlp | tiny
    # | inception_resnet_v2 (from 75 pixels on)
    # | efficientnet_lite0 | convnext_tiny, _small, _base | convnextv2_nano, _tiny, _base (from 32 pixels on)
    # | vit_ti16 | vit_s16 | vit_b16 | vit_l16 | vit_so16 | vit_b32 | vit_s14 | vit_b14 | vit_l14 | vit_so14: the number
    # is the side of a patch; the sides of the image must be multiples of it
    model.name = "wide_resnet"
    model.depth = 10  # † wide_resnet: 6 n + 4 layers; mlp: hidden layers
    # Multiple of the channels: wide_resnet (16, 32, 64 at width 1), mlp (256) and the others, resnet29_v2 apart.
    model.width = 1.0  # †
    model.variant = "authors"  # authors | standard: wide_resnet and resnet29_v2; see ieg_jax/models/
    # float32 | bfloat16 | float64: of the computation. Parameters, losses and meta-gradients are float32 or better;
    # float64 is for checks, slow, and needs JAX_ENABLE_X64=1.
    model.dtype = "float32"
    model.remat = False  # keep only the inputs of each block, and compute it once more in the backward pass
    # auto | lax | onednn: who computes convolutions of float32 on one processor, XLA (lax) or oneDNN, which
    # pip install 'ieg_jax[cpu]' brings. auto = oneDNN where it is there and faster; onednn = an error where it is not
    # there. Several devices, other ones and exported programs have XLA's.
    model.convolutions = "auto"
    # .safetensors or .npz file of the weights at step 0: of another run (ieg_jax.export) or as torchvision, timm,
    # transformers and others publish them; docs/running.md. A later start does without it. "" = random weights
    model.pretrained = ""
    # What published weights expect: own = images in [-1, 1] as they are | torch = each colour less ImageNet's mean, by
    # its deviation (torchvision, timm, transformers) | flax = the same, and SAME padding (Flax's ResNet-50).
    # vit_* alone: dinov2 = layer scale, four registers | dinov2_plain = without registers | clip, open_clip = the image
    # tower of CLIP, with its own GELU or GELU | siglip
    model.conventions = "own"

    # The keys of methods live in their modules, ieg_jax/methods; docs/methods.md has each with its default, what is
    # allowed, and which methods read it. One that is set and that the method does not read is an error.
    config.method = ConfigDict({"name": "ieg"})  # a name in ieg_jax/methods/__init__.py
    config.meta = ConfigDict()  # the lookahead step
    config.update_from_flattened_dict(methods.defaults())

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd | adam | adamw
    optimizer.momentum = 0.9  # sgd: decay of the momentum; adam, adamw: β₁ (β₂ = 0.999); in [0, 1)
    optimizer.nesterov = False
    # sgd, adam: adds weight_decay · ½‖Θ‖² to every loss; adamw: no such term, each update takes the share
    # learning rate · weight_decay off the weights; >= 0
    optimizer.weight_decay = 5e-4
    optimizer.weight_decay_on = "all"  # all | kernels (no biases, no batch-norm parameters)

    config.schedule = schedule = ConfigDict()
    # sgdr: cosine with warm restarts | cosine: one cosine to 0 at the last step | step: falls at given steps | constant
    schedule.name = "sgdr"
    schedule.base_lr = 0.1  # learning rate at step 0; > 0
    schedule.first_cycle_steps = 0  # sgdr: length of the first cycle
    schedule.first_cycle_epochs = 1.0
    schedule.cycle_mult = 1.5  # sgdr: each cycle is this many times as long as the one before; >= 1
    schedule.peak_mult = 0.9  # sgdr: each cycle starts at this many times the rate of the one before; in (0, 1]

    schedule.warmup_epochs = 0.0  # the rate rises in so many from 0 to what the schedule says
    schedule.step_boundaries = (40_000, 50_000)  # step: where the rate falls, in steps, increasing
    schedule.step_factor = 0.1  # step: to this share of itself; in (0, 1)

    # Of a network that starts from model.pretrained; train/finetune.py says why.
    config.finetune = finetune = ConfigDict()
    finetune.body_rate = 1.0  # learning rate of all layers but the head, as a share of that; in [0, 1]
    finetune.layer_decay = 1.0  # each layer below takes this share of the rate of the one above; in (0, 1]
    finetune.probe_epochs = 0.0  # the head alone learns until so many are over

    config.ema = ema = ConfigDict()
    ema.decay = 0.999  # of the moving average of the weights, in [0, 1); 0 = no average
    ema.warmup = True  # decay min(ema.decay, (1 + t) / (10 + t)) after step t

    config.mesh = mesh = ConfigDict()
    # The batch is split over data × fsdp devices; parameters, their average and the optimiser's state over fsdp.
    mesh.data = -1  # -1 = all there are, divided by fsdp
    mesh.fsdp = 1  # for networks whose state is too large for one device

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.keep = 2  # newest checkpoints kept; at least 1
    checkpoint.keep_every_steps = 0  # keep besides each whose step is a multiple of this; 0 = none
    checkpoint.keep_best = 0  # keep besides the best this many by best_metric; 0 = none
    checkpoint.best_metric = "trusted/accuracy"  # a name in metrics.jsonl; only steps that evaluate it compete
    checkpoint.best_mode = "max"  # max | min: which values of it are good

    config.audit = audit = ConfigDict()
    audit.epochs = 5.0  # ω and λ of each example are averaged over this many last epochs (examples.npz); 0 = not
    audit.suspects = 16  # examples with the most doubtful labels, drawn for TensorBoard at evaluations; 0 = none

    config.wandb = wandb = ConfigDict()  # Weights & Biases beside TensorBoard: pip install 'ieg_jax[wandb]'
    wandb.project = ""  # project, or team/project; "" = not
    wandb.name = ""  # of the run; "" = that of the work folder
    wandb.mode = (
        ""  # online | offline (files in the work folder, for `wandb sync`); "" = as WANDB_MODE says, else online
    )

    config.profile = profile = ConfigDict()  # traces for TensorBoard's profiler; see also docs/running.md
    profile.start_step = 0  # the first step that is traced; 0 = none
    profile.num_steps = 5
    # Without a finished step for this long, the stacks of all threads are written down; 0 = never.
    config.stall_minutes = 20.0

    config_lib.apply_reference(config, args.reference)
    return config
