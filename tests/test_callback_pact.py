"""The life of a `PACTCallback`: every way to add it, and everything that a fastai user does to a learner."""
import copy, pickle, warnings
from functools import partial

import cloudpickle, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastcore.basics import noop
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader as TorchLoader, IterableDataset, SequentialSampler, SubsetRandomSampler, TensorDataset

import qisal.data  # noqa: F401  (imports fastai without its warnings)
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *  # noqa: F403  (`fit_one_cycle`, `lr_find`)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, Lookahead, Optimizer, OptimWrapper, ranger
from fastai.vision.augment import Brightness
from fastai.vision.core import TensorImage
from fastai.vision.data import ImageDataLoaders, Normalize

from qisal import quant
from qisal.callback.pact import PACTCallback, _some_batches, add_alpha_group, bare_model, clip_shares, find_input_range
from qisal.core import BadInput, set_seed
from qisal.data import get_dls
from qisal.models import lenet5, resnet20, small_cnn
from qisal.quant import ALPHA_MIN, PACT, InputQuant, QLinear, compile_pact, has_compiler, pacts, quant_layers


def make(tmp_path, cbs=None, model=None, **kw):
    set_seed(0)
    dls = get_dls('mnist', sample=True, n_train=320, batch_size=64)
    learn = Learner(dls, model or lenet5(), metrics=accuracy, cbs=cbs, path=tmp_path, **kw)
    learn.create_mbar, learn.logger = False, lambda *a: None
    return learn


def alphas(learn): return [m.alpha.item() for m in pacts(learn.model).values()]


def groups_ok(learn):
    "Alpha is in group 0, once, and every other parameter is in another group, once."
    ids = [id(p) for pl in learn.opt.param_lists for p in pl]
    assert len(ids) == len(set(ids)) == len(list(learn.model.parameters()))
    assert {id(p) for p in learn.opt.param_lists[0]} == {id(m.alpha) for m in pacts(learn.model).values()}


START = .05  # a level that clips from the first batch, in every layer


def pact(**kw): return PACTCallback(alpha_init=START, **kw)


@pytest.mark.parametrize('opt', ['adam', 'sgd', 'adamw'])
@pytest.mark.parametrize('where', ['init', 'add_cb', 'fit', 'one_cycle', 'add_after_fit'])
def test_alpha_trains_wherever_it_is_added(tmp_path, where, opt):
    kw = dict(adam={}, sgd=dict(opt_func=SGD), adamw=dict(opt_func=lambda p, **k: OptimWrapper(p, torch.optim.AdamW, **k)))[opt]
    learn = make(tmp_path, pact() if where == 'init' else None, **kw)
    if where == 'add_after_fit': learn.fit(1)
    if where in ('add_cb', 'add_after_fit'): learn.add_cb(pact())
    lr = .1 if opt == 'sgd' else .01  # SGD's steps are as small as the gradients
    if where == 'fit': learn.fit(1, lr, cbs=pact())
    elif where == 'one_cycle': learn.fit_one_cycle(1, lr, cbs=pact())
    else: learn.fit_one_cycle(1, lr)
    assert len(pacts(learn.model)) == 4 and len(quant_layers(learn.model)) == 5
    assert all(abs(a - START) > 1e-6 for a in alphas(learn)), alphas(learn)
    groups_ok(learn)


def test_gradient_and_step_are_those_of_the_formula(tmp_path):
    "One step of plain SGD moves alpha by lr * (d loss / d alpha + decay * alpha)."
    learn = make(tmp_path, pact(alpha_decay=.01), opt_func=lambda p, **k: SGD(p, mom=0., **k), wd=0.)
    grads, before = [], alphas(learn)

    class Grab(Callback):
        order = 100

        def before_step(self): grads.append([m.alpha.grad.item() for m in pacts(self.learn.model).values()])

        def after_batch(self):
            if self.training: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .1, cbs=Grab())
    np.testing.assert_allclose(alphas(learn), [a - .1*(g + .01*a) for a, g in zip(before, grads[0])], rtol=1e-5)
    assert any(abs(g) > 1e-6 for g in grads[0])


def test_own_lr_and_decay(tmp_path):
    learn = make(tmp_path, pact(alpha_lr=.5, alpha_decay=.02), wd=.1)
    learn.fit_one_cycle(1, 1e-3)
    assert learn.opt.hypers[0]['lr'] == .5 and learn.opt.hypers[0]['wd'] == 0 and learn.opt.alpha_decay == .02
    assert learn.opt.hypers[1]['wd'] == .1 and max(learn.recorder.lrs) <= 1e-3
    learn = make(tmp_path, pact())
    learn.fit_one_cycle(1, 1e-3)
    assert learn.opt.hypers[0]['lr'] == learn.opt.hypers[1]['lr']


def test_discriminative_lr_and_freezing(tmp_path):
    splitter = lambda m: [list(m[:3].parameters()), list(m[3:7].parameters()), list(m[7:].parameters())]  # noqa: E731
    learn = make(tmp_path, pact(), splitter=splitter)
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    assert [len(pl) for pl in learn.opt.param_lists][0] == 4 and len(learn.opt.hypers) == 4
    np.testing.assert_allclose([h['lr'] for h in learn.opt.hypers][1:], np.geomspace(1e-4, 1e-2, 3)*learn.opt.hypers[3]['lr']/1e-2, rtol=1e-3)
    for n, want in ((-1, [False, False, True]), (1, [False, True, True]), (2, [False, False, True]), (0, [True, True, True])):
        learn.freeze_to(n)
        assert [all(p.requires_grad for p in pl) for pl in learn.opt.param_lists[1:]] == want, n
        assert all(m.alpha.requires_grad for m in pacts(learn.model).values())
    learn.create_opt()  # fastai goes on to step (with zero gradients) what had gradients before it was frozen
    for p in learn.model.parameters(): p.grad = None
    learn.freeze()
    first, was = learn.model[0].weight.clone(), alphas(learn)
    learn.fit(1, 1e-2)
    assert torch.equal(first, learn.model[0].weight) and alphas(learn) != was
    learn.unfreeze()
    learn.fit(1, 1e-2)
    assert not torch.equal(first, learn.model[0].weight)
    groups_ok(learn)


def test_lr_find_changes_nothing(tmp_path):
    learn = make(tmp_path, pact())
    learn.create_opt()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(num_it=8, show_plot=False)
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    assert learn.recorder.lrs[-1] > learn.recorder.lrs[0]  # the learning rate that was searched, not alpha's
    learn.fit(1, 1e-2)
    groups_ok(learn)


def test_lr_find_with_constant_alpha_lr(tmp_path):
    learn = make(tmp_path, pact(alpha_lr=.01))
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.recorder.lrs[0] < 1e-6 and learn.recorder.lrs[-1] > 1e-6


def test_second_fit_goes_on(tmp_path):
    cb = pact()
    learn = make(tmp_path, cb)
    learn.fit(1, 1e-2)
    mods, one = list(pacts(learn.model).values()), alphas(learn)
    learn.fit(1, 1e-2)
    assert mods == list(pacts(learn.model).values()) and alphas(learn) != one
    learn.fit(1, 1e-2, reset_opt=True)
    groups_ok(learn)
    learn = make(tmp_path)
    for _ in range(2): learn.fit(1, 1e-2, cbs=pact())  # a second callback finds a converted model and keeps its alphas
    assert all(abs(a - START) > 1e-5 for a in alphas(learn))
    groups_ok(learn)


def test_save_load_in_the_middle(tmp_path):
    learn = make(tmp_path, pact())
    learn.fit(1, 1e-2)
    learn.save('half')
    saved, state = alphas(learn), [s.get('step', s.get('sqr_avg')) for s in learn.opt.state_dict()['state']]
    learn.fit(1, 1e-2)
    assert alphas(learn) != saved
    other = make(tmp_path, pact())
    for o in (learn, other):
        o.load('half')
        assert alphas(o) == saved
        groups_ok(o)
        for a, b in zip(state, [s.get('step', s.get('sqr_avg')) for s in o.opt.state_dict()['state']]):
            assert (a == b).all() if torch.is_tensor(a) else a == b
        o.fit(1, 1e-2)
        assert alphas(o) != saved


def test_float_checkpoint_loads(tmp_path):
    floats = make(tmp_path)
    floats.fit(1, 1e-2)
    floats.save('float', with_opt=False)
    learn = make(tmp_path, pact())
    learn.load('float', with_opt=False)
    assert torch.equal(learn.model[0].weight, floats.model[0].weight) and alphas(learn) == pytest.approx([START]*4)
    learn.fit(1, 1e-3)
    groups_ok(learn)


def test_save_model_callback(tmp_path):
    learn = make(tmp_path, [pact(), SaveModelCallback(monitor='accuracy', fname='best')])
    learn.fit(2, 1e-2)
    groups_ok(learn)
    assert (tmp_path/'models'/'best.pth').exists()


class StopAt(Callback):
    "Raise something in the middle of a fit."
    order = 20

    def __init__(self, event, ex): self.ev, self.ex = event, ex
    def __call__(self, name):
        if name == self.ev and self.learn.training and self.learn.iter == 2: raise self.ex
        return super().__call__(name)


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch'])
def test_interrupted_fit(tmp_path, event):
    learn = make(tmp_path, pact())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=StopAt(event, KeyboardInterrupt()))
    half = alphas(learn)
    learn.fit(1, 1e-2)
    assert alphas(learn) != half
    groups_ok(learn)


def test_bf16_accumulation_mixup(tmp_path):
    for extra in ([MixedPrecision(amp_mode=AMPMode.BF16)], [GradientAccumulation(128)], [MixUp()],
                  [MixedPrecision(amp_mode=AMPMode.BF16), GradientAccumulation(128), MixUp()]):
        learn = make(tmp_path, [pact(), *extra])
        learn.fit(1, 1e-2)
        assert np.isfinite(learn.recorder.values[-1][:1]).all() and all(abs(a - START) > 1e-5 for a in alphas(learn))
        groups_ok(learn)


def test_accumulation_decays_once_a_step(tmp_path):
    "Two half batches give the same alphas as one whole batch."
    res = []
    for bs, cbs in ((64, []), (32, [GradientAccumulation(64)])):
        set_seed(0)
        dls = get_dls('mnist', sample=True, n_train=320, batch_size=bs)
        learn = Learner(dls, lenet5(), cbs=[pact(alpha_decay=.5), *cbs], path=tmp_path, opt_func=lambda p, **k: SGD(p, mom=0., **k), wd=0.)
        learn.create_mbar, learn.logger = False, lambda *a: None
        learn.fit(1, 1e-2)
        res.append(alphas(learn))
    np.testing.assert_allclose(*res, rtol=2e-3)


def test_removed_callback_keeps_the_model_quantized(tmp_path):
    cb = pact()
    learn = make(tmp_path)
    learn.fit(1, 1e-2, cbs=cb)
    assert cb not in learn.cbs and learn.pact not in learn.cbs and len(quant_layers(learn.model)) == 5
    assert list(cb.alphas().layer) == list(pacts(learn.model)) and quant_layers(cb.bake())
    assert not any(isinstance(m, PACT) for m in cb.strip().modules())


def test_creation_moves_no_random_generator(tmp_path):
    learn = make(tmp_path)
    set_seed(5)
    want = torch.rand(3), np.random.rand(3)
    set_seed(5)
    learn.add_cb(pact())
    learn.pact._convert()
    learn.pact.alphas()
    got = torch.rand(3), np.random.rand(3)
    assert torch.equal(want[0], got[0]) and (want[1] == got[1]).all()


def test_modes_are_restored(tmp_path):
    learn = make(tmp_path, pact(), model=small_cnn())
    learn.model.train()
    learn.model[5].eval()
    modes = [m.training for m in learn.model.modules()]
    learn.pact.alphas()
    learn.pact.bake()
    assert modes == [m.training for m in learn.model.modules()]


def test_conversion_leaves_batch_norm_statistics(tmp_path):
    model = resnet20(n_in=1, size=28)
    before = {k: v.clone() for k, v in model.named_buffers()}
    learn = make(tmp_path, pact(), model=model)
    learn.pact.alphas()
    for k, v in before.items(): assert torch.equal(v, dict(model.named_buffers())[k]), k


def test_a_pair_of_bits(tmp_path):
    learn = make(tmp_path, PACTCallback(w_bits=(4, 2), a_bits=(8, 4)))
    assert [(m.w_bits, m.a_bits) for m in quant_layers(learn.model).values()] == [(8, 8), (4, 8), (4, 8), (2, 4), (8, 8)]
    with pytest.raises(BadInput, match='no quantizer'): PACTCallback.from_bits('32')


def test_input_grid_is_that_of_the_data(tmp_path):
    learn = make(tmp_path, pact())
    iq = quant_layers(learn.model)['0'].input_quant
    assert (iq.lo, iq.hi) == pytest.approx(learn.dls.train.input_range)


def test_module_without_relu_reads_floats_only_on_purpose(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Linear(32, 10))
    with pytest.raises(BadInput, match='2 .Linear. reads a signed value'): make(tmp_path, pact(), model=model)
    learn = make(tmp_path, pact(overrides={'2': (8, 32)}), model=model)
    assert quant_layers(learn.model)['2'].a_bits == 32 and quant_layers(learn.model)['2'].w_bits == 8


def test_alpha_is_never_left_below_its_bound(tmp_path):
    "A step that is far too large can't leave a negative alpha behind, not even the last one before a save."
    learn = make(tmp_path, pact(alpha_lr=.5, alpha_decay=1.))
    seen = []

    class See(Callback):
        def after_step(self): seen.append(min(alphas(self.learn)))
    learn.fit(1, 1e-3, cbs=See())
    assert min(seen) >= ALPHA_MIN*.999 and min(seen) < 2*ALPHA_MIN
    assert learn.pact.alphas().touched.any()


@pytest.mark.parametrize('wish,epochs,compiler,asked', [(None, 300, True, [True]), (None, 1, True, []), (None, 300, False, []), (True, 1, True, [True]), (False, 300, True, [False])])
def test_long_fits_compile_the_quantizer(tmp_path, monkeypatch, wish, epochs, compiler, asked):
    "None: from 1,000 steps on and with a compiler (300 epochs have 1,200 steps here); True and False: as said."
    import qisal.callback.pact as module
    calls = []
    monkeypatch.setattr(module, 'compile_pact', lambda on=True: calls.append(on))
    monkeypatch.setattr(module, 'has_compiler', lambda: compiler)
    learn = make(tmp_path, PACTCallback(compiled=wish))
    class Stop(Callback):
        def before_epoch(self): raise CancelFitException
    learn.fit(epochs, cbs=Stop())
    assert calls == asked


def test_compiled_training_learns_the_same(tmp_path):
    if not has_compiler(): pytest.skip('no C++ compiler')
    try: weights = [torch.cat([p.detach().flatten() for p in _fitted(tmp_path, o).model.parameters()]) for o in (False, True)]
    finally: compile_pact(False)
    np.testing.assert_allclose(*weights, atol=1e-4)


def _fitted(tmp_path, compiled):
    learn = make(tmp_path, PACTCallback(compiled=compiled), opt_func=SGD)
    learn.fit(1, 1e-2)
    return learn


def test_compiled_is_none_or_a_flag():
    with pytest.raises(BadInput, match="compiled 'yes' is unknown"): PACTCallback(compiled='yes')


# ---- optimizers that wrap another

def lookahead_twice(params, lr, **kw): return Lookahead(Lookahead(Adam(params, lr=lr), k=2), k=3)
def lookahead_torch(params, lr, **kw): return Lookahead(OptimWrapper(params, torch.optim.AdamW, lr=lr))


def fitted(tmp_path, cbs, opt_func, **kw):
    learn = make(tmp_path, cbs, opt_func=opt_func, **kw)
    was = [p.detach().clone() for p in learn.model.parameters() if p.dim()]
    learn.fit(2, 1e-3)  # the rate that the optimizer was made with: fastai itself sets none for Lookahead around a torch optimizer
    return learn, sum((p - w).abs().sum().item() for p, w in zip((p for p in learn.model.parameters() if p.dim()), was))


@pytest.mark.parametrize('opt', [ranger, lookahead_twice, lookahead_torch], ids=lambda o: o.__name__)
def test_wrapped_optimizer_trains_weights_and_alphas(tmp_path, opt):
    "The weights go about as far as without PACT (whose forward has slightly other gradients), and each alpha moves."
    _, far = fitted(tmp_path, None, opt)
    learn, moved = fitted(tmp_path, PACTCallback(8, 8, alpha_init=1.), opt)
    assert .6*far < moved < 1.6*far
    assert all(a != 1. for a in alphas(learn)), alphas(learn)
    levels, o = [], learn.opt
    while isinstance(o, (Lookahead, Optimizer, OptimWrapper)):
        levels.append(o)
        o = vars(o).get('opt')
    assert all(len(o.param_lists) == len(o.hypers) == 2 for o in levels) and 'param_lists' not in vars(learn.opt)
    groups_ok(learn)
    for o in levels[:-1]: assert [[s.shape for s in pl] for pl in o.slow_weights] == [[p.shape for p in pl] for pl in o.param_lists]
    learn.create_opt()
    groups_ok(learn)


def test_weights_of_a_wrapped_optimizer_are_stepped_as_without_alphas():
    "The same gradients give the same weights, bit for bit, also when the group comes after some steps; the slow weights stay each with its own."
    def steps(with_alpha):
        torch.manual_seed(0)
        w, b, alpha = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2)), nn.Parameter(torch.tensor(1.))
        opt = ranger([[w, *([alpha] if with_alpha else [])], [b]], lr=.1, k=4)
        for i in range(9):
            if with_alpha and i == 2:
                slow = {id(p): s for pl, sl in zip(opt.param_lists, opt.slow_weights) for p, s in zip(pl, sl)}
                add_alpha_group(opt, [alpha])
                assert all(slow[id(p)] is s for pl, sl in zip(opt.param_lists, opt.slow_weights) for p, s in zip(pl, sl))
            if i == 5: opt.set_hyper('lr', [.05, .2])
            for p in (w, b): p.grad = torch.full_like(p, (-1.)**i + .3)
            alpha.grad = torch.tensor(-1.)
            opt.step()
        return w, b, alpha
    (w, b, _), (w2, b2, alpha) = steps(False), steps(True)
    assert torch.equal(w, w2) and torch.equal(b, b2) and alpha > 1


@pytest.mark.parametrize('opt', [ranger, lookahead_torch], ids=lambda o: o.__name__)
def test_freezing_and_rates_of_a_wrapped_optimizer(tmp_path, opt):
    splitter = lambda m: [list(m[:3].parameters()), list(m[3:7].parameters()), list(m[7:].parameters())]  # noqa: E731
    learn = make(tmp_path, pact(alpha_lr=.02), splitter=splitter, opt_func=opt)
    learn.freeze()
    assert learn.opt.frozen_idx == 2 and all(m.alpha.requires_grad for m in pacts(learn.model).values())
    first, was = learn.model[0].weight.clone(), alphas(learn)
    learn.fit(1, 1e-2)
    assert torch.equal(first, learn.model[0].weight) and alphas(learn) != was
    learn.unfreeze()
    learn.fit(1, slice(1e-4, 1e-2))
    np.testing.assert_allclose([h['lr'] for h in learn.opt.hypers], [.02, 1e-4, 1e-3, 1e-2])
    assert not torch.equal(first, learn.model[0].weight)
    learn.save('half')
    state = [o.clone() for pl in learn.opt.slow_weights for o in pl]
    learn.fit(1, 1e-2)
    learn.load('half')
    assert all(torch.equal(a, b) for a, b in zip(state, (o for pl in learn.opt.slow_weights for o in pl)))
    groups_ok(learn)


class Copies(Optimizer):
    "A wrapper that keeps lists of its own, which no alpha can reach through it."
    def __init__(self, opt): self.opt, self.param_lists, self.hypers, self.state = opt, list(opt.param_lists), list(opt.hypers), opt.state
    def step(self): self.opt.step()


def test_a_wrapper_with_lists_of_its_own_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r'reach what Copies steps \(it keeps 1 parameter lists and 1 sets'):
        make(tmp_path, pact(), opt_func=lambda p, **k: Copies(SGD(p, **k))).create_opt()


class TorchWrapper(torch.optim.Optimizer):
    "A torch optimizer around another, whose groups it shares or copies."
    def __init__(self, params, lr, share, **kw):
        inner = torch.optim.Adam(params, lr=lr)
        super().__init__([dict(g) for g in inner.param_groups], dict(inner.defaults))
        self.inner, self.param_groups = inner, inner.param_groups if share else self.param_groups

    def step(self, closure=None): self.inner.step()


def test_a_torch_wrapper_passes_the_alphas_on_or_is_refused(tmp_path):
    def opt(share): return lambda p, lr, **kw: OptimWrapper(p, partial(TorchWrapper, share=share), lr=lr)
    learn = make(tmp_path, pact(), opt_func=opt(True))
    learn.fit(1, 1e-2)
    assert all(abs(a - START) > 1e-5 for a in alphas(learn))
    learn = make(tmp_path, opt_func=opt(False))
    learn.fit(1, 1e-2)  # an optimizer without alphas, which would get them in the outer groups alone
    with pytest.raises(BadInput, match='reach what OptimWrapper steps .* they would not train'): learn.fit(1, cbs=pact())


def test_settings_of_a_second_callback_are_taken(tmp_path):
    learn = make(tmp_path)
    learn.fit(1, 1e-3, cbs=pact())
    learn.fit(1, 1e-3, cbs=pact(w_bits=2, alpha_lr=.3, alpha_decay=.5))
    assert learn.opt.hypers[0]['lr'] == .3 and learn.opt.alpha_decay == .5 and quant_layers(learn.model)['3'].w_bits == 2
    learn.fit(1, 1e-3, cbs=pact(w_bits=2))
    assert learn.opt.hypers[0]['lr'] == 1e-3 and learn.opt.alpha_decay == 1e-4


def test_float_optimizer_state_then_pact(tmp_path):
    "An optimizer whose state was loaded before the alphas came goes on."
    learn = make(tmp_path)
    learn.fit(1, 1e-2)
    learn.save('float')
    learn.load('float')
    learn.fit(1, 1e-2, cbs=pact())
    assert all(abs(a - START) > 1e-5 for a in alphas(learn))
    groups_ok(learn)


# ---- pickles and exports

def same_training(a, b):
    for o in (a, b):
        set_seed(3)
        o.fit(1, 1e-2)
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    groups_ok(b)


@pytest.mark.parametrize('opt', [Adam, ranger], ids=lambda o: o.__name__)
def test_learner_and_optimizer_pickle_and_go_on(tmp_path, opt):
    learn = make(tmp_path, pact(alpha_decay=.1), opt_func=opt)
    learn.fit(1, 1e-2)
    copied = pickle.loads(pickle.dumps(learn.opt))
    assert type(copied) is type(learn.opt) and len(copied.param_lists) == len(copied.hypers) == 2
    copied.set_hyper('lr', .5)
    assert [h['lr'] for h in copied.hypers] == [.5, .5] and learn.opt.hypers[1]['lr'] == 1e-2
    other, third = copy.deepcopy(learn), cloudpickle.loads(cloudpickle.dumps(learn))
    other.logger = third.logger = learn.logger
    assert other.pact.learn is other and other.opt is not learn.opt
    same_training(learn, other)
    with pytest.raises(BadInput, match='no images'): third.pact.alphas()  # none travel
    third.dls = learn.dls
    assert list(third.pact.alphas().layer) == list(pacts(third.model))


def image_folder(tmp_path, n=24):
    "Two classes of noise images, and a table that names them, with a private column."
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).save(path := tmp_path/f'{i}.png')
        rows.append((str(path), 'ab'[i % 2], 'a private remark'))
    return pd.DataFrame(rows, columns=['name', 'label', 'note'])


def small_net(n_in=3, n_out=2): return nn.Sequential(nn.Conv2d(n_in, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out))


def quiet(learn):
    learn.create_mbar, learn.logger = False, noop
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    return learn


def image_learner(tmp_path, cbs, tfms=(), **kw):
    dls = ImageDataLoaders.from_df(image_folder(tmp_path), path='/', fn_col='name', label_col='label', bs=8, num_workers=0, batch_tfms=list(tfms))
    return quiet(Learner(dls, small_net(), loss_func=CrossEntropyLossFlat(), cbs=cbs, path=tmp_path, **kw))


@pytest.mark.parametrize('where', ['init', 'fit'])
def test_an_exported_learner_holds_no_data_and_predicts(tmp_path, where):
    learn = image_learner(tmp_path, pact() if where == 'init' else None)
    learn.fit(1, cbs=pact() if where == 'fit' else None)
    learn.export('x.pkl')
    assert b'a private remark' not in (tmp_path/'x.pkl').read_bytes()
    back = quiet(load_learner(tmp_path/'x.pkl'))
    image = tmp_path/'3.png'
    assert torch.equal(back.predict(image)[2], learn.predict(image)[2])
    assert quant_layers(back.pact.bake()) and not quant_layers(back.pact.strip())
    learn.fit(1, 1e-2)
    groups_ok(learn)


# ---- which network, which data

def test_bake_alphas_and_strip_speak_of_the_network_of_the_moment(tmp_path):
    learn = make(tmp_path, pact())
    averaged = copy.deepcopy(learn.model)
    with torch.no_grad(): averaged[0].weight.mul_(.5), averaged[1].alpha.fill_(.25)
    for model in (averaged, torch.compile(averaged, backend='eager'), nn.DataParallel(averaged), AveragedModel(averaged)):
        learn.model = model
        net = bare_model(model)
        assert torch.equal(learn.pact.strip()[0].weight, net[0].weight)
        assert learn.pact.alphas().alpha[0] == .25 and type(learn.pact.bake()) is nn.Sequential
        learn.validate()
        assert alphas(learn)[0] == .25
    learn.model = lenet5()
    with pytest.raises(BadInput, match='converted no model yet'): learn.pact.bake()


def test_a_compiled_network_is_converted_inside(tmp_path):
    learn = make(tmp_path, model=torch.compile(lenet5(), backend='eager'))
    learn.fit(1, 1e-2, cbs=pact())
    assert list(learn.pact.alphas().layer) == list(pacts(learn.model._orig_mod)) and all(abs(a - START) > 1e-5 for a in alphas(learn))
    groups_ok(learn)


def test_a_network_that_the_optimizer_does_not_hold_is_not_trained_in_vain(tmp_path):
    learn = make(tmp_path, pact())
    learn.fit(1, 1e-2)
    old, learn.model = learn.model, copy.deepcopy(learn.model)
    before = learn.validate()
    assert {id(p) for p in learn.opt.param_lists[0]} == {id(m.alpha) for m in pacts(old).values()}
    with pytest.raises(BadInput, match=r'The optimizer holds no weight of learn.model.*learn.create_opt\(\)'): learn.fit(1)
    assert learn.validate() == before
    learn.create_opt()
    learn.fit(1, 1e-2)
    groups_ok(learn)
    assert learn.validate() != before


def test_a_layer_put_in_later_is_quantized_too(tmp_path):
    learn = make(tmp_path, pact())
    learn.model[11] = nn.Linear(84, 10)
    learn.create_opt()
    learn.fit(1, 1e-2)
    assert type(learn.model[11]) is QLinear


def test_after_fit_with_the_callback_there_is_something_to_ask(tmp_path):
    learn, cb = make(tmp_path), pact()
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.alphas().equals(learn.pact.alphas()) and quant_layers(cb.bake())
    learn.create_opt()
    groups_ok(learn)
    with pytest.raises(BadInput, match='belongs to no Learner'): PACTCallback().alphas()
    other = make(tmp_path, model=small_cnn())
    assert not hasattr(other, 'pact')
    other.fit(1, 1e-2, cbs=cb)  # the same callback
    assert len(other.pact.alphas()) == len(cb.alphas()) == 3 and len(learn.pact.alphas()) == 4
    learn.remove_cb(PACTCallback)
    learn.remove_cb(cb)
    assert len(learn.pact.alphas()) == 4


def test_a_baked_network_answers_as_before_and_is_not_trained(tmp_path):
    learn = make(tmp_path, pact(w_bits=2, a_bits=2))
    learn.fit(1, 1e-2)
    baked, x = learn.pact.bake().eval(), learn.dls.valid.one_batch()[0]
    with torch.no_grad(): want = baked(x)
    other = make(tmp_path, pact(w_bits=2, a_bits=2), model=baked)
    other.validate()
    with torch.no_grad(): assert torch.equal(baked.eval()(x), want)
    assert torch.equal(other.get_preds(act=lambda o: o)[0][:len(x)], want)
    with pytest.raises(BadInput, match=r'0 \(QConv2d\) is baked: .*qisal.quant.strip\(learn.model\)'): other.fit(1)
    with torch.no_grad(): assert torch.equal(baked.eval()(x), want)
    other.model = quant.strip(other.model)
    other.create_opt()
    other.fit(1, 1e-2)
    groups_ok(other)


# ---- the input grid

def grid(learn): return next(m for m in learn.model.modules() if isinstance(m, InputQuant))


def test_the_grid_follows_the_training_data_and_only_when_it_trains(tmp_path):
    learn = make(tmp_path, pact())
    other = get_dls('fashion_mnist', sample=True, n_train=320, batch_size=64)
    was, lo_hi = (grid(learn).lo, grid(learn).hi), other.train.input_range
    learn.dls = other
    learn.validate()
    learn.pact.alphas()
    assert (grid(learn).lo, grid(learn).hi) == was
    learn.lr_find(num_it=8, show_plot=False)  # which loads what it has saved before
    learn.fit(1)
    assert (grid(learn).lo, grid(learn).hi) == pytest.approx(lo_hi)
    model, x = learn.model.eval(), other.valid.one_batch()[0]
    shares = clip_shares(model, [other.valid.dataset[torch.arange(other.valid.n)][0]])
    assert learn.pact.alphas(other.valid).clipped.tolist() == pytest.approx(list(shares.values()))


def tensors(scale, n=64, size=(12, 12), bs=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TorchLoader(TensorDataset(scale*torch.rand(n, 1, *size, generator=g), torch.arange(n) % 3), bs, shuffle=True)


def tensor_learner(tmp_path, train, valid=None, net=None, **kw):
    return quiet(Learner(DataLoaders(train, valid or tensors(1.)), net or small_net(1, 3), loss_func=CrossEntropyLossFlat(), path=tmp_path, **kw))


def test_the_grid_is_loaded_with_a_checkpoint(tmp_path):
    a = tensor_learner(tmp_path, tensors(1.), cbs=pact())
    a.save('m')
    b = tensor_learner(tmp_path, tensors(.3), cbs=pact())
    assert grid(b).hi < .5*grid(a).hi
    b.load('m')
    b.validate()
    assert (grid(b).lo, grid(b).hi) == (grid(a).lo, grid(a).hi)
    x = torch.rand(8, 1, 12, 12)
    with torch.no_grad(): assert torch.equal(a.model.eval()(x), b.model.eval()(x))


STATS = [.485, .456, .406], [.229, .224, .225]


@pytest.mark.parametrize('name,tfms,want', [
    ('normalised', [Normalize.from_stats(*STATS)], (-.485/.229, (1 - .406)/.225)), ('not normalised', [], (0., 1.)),
    ('augmented', [Brightness(.9, p=1.), Normalize.from_stats(*STATS)], (-.485/.229, (1 - .406)/.225))])
def test_grid_of_a_known_normalisation(tmp_path, name, tfms, want):
    "Exactly the smallest (0 - mean)/std and the largest (1 - mean)/std, whatever the images hold."
    learn = image_learner(tmp_path, pact(), tfms)
    assert (grid(learn).lo, grid(learn).hi) == pytest.approx(want, rel=1e-6)


def test_grid_follows_a_normalisation_that_is_added_later(tmp_path):
    learn = image_learner(tmp_path, pact())
    assert (grid(learn).lo, grid(learn).hi) == (0., 1.)
    learn.dls.add_tfms([Normalize.from_stats(*STATS)], 'after_batch')
    learn.fit(1)
    assert (grid(learn).lo, grid(learn).hi) == pytest.approx((-.485/.229, (1 - .406)/.225), rel=1e-6)


def test_a_normalisation_of_other_than_images_is_not_believed(tmp_path):
    "Pixels of 0 to 255 that were never brought to 0 to 1: the grid is measured."
    dls = DataLoaders(*[TfmdDL([(TensorImage(torch.rand(3, 12, 12)*255), i % 2) for i in range(64)], bs=16, num_workers=0,
                               after_batch=[Normalize.from_stats(*STATS, cuda=False)]) for _ in range(2)])
    learn = quiet(Learner(dls, small_net(), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=pact()))
    assert grid(learn).hi > 250/.225


def brightness(n, classes):
    "Images of one brightness a class, with a little noise."
    x = torch.tensor([.1, .5, .9])[classes][:, None, None, None] + .05*torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, classes)


def test_a_validation_set_that_is_sorted_dark_class_first(tmp_path):
    "One batch of it would put the grid's end at 0.15, and the other two classes would look alike (67 % right)."
    set_seed(0)
    train, valid = brightness(300, torch.arange(300) % 3), brightness(150, torch.arange(150)//50)
    loaders = DataLoader(train, bs=30, shuffle=True, num_workers=0), DataLoader(valid, bs=50, num_workers=0)
    assert loaders[1].one_batch()[0].max() < .16
    learn = tensor_learner(tmp_path, *loaders, metrics=accuracy, cbs=PACTCallback())
    assert .95 <= grid(learn).hi < 1.1
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(6, 2e-2)
    assert learn.recorder.values[-1][-1] == 1.


def test_an_end_that_several_batches_reach_gets_no_margin(tmp_path):
    x = torch.rand(200, 1, 8, 8)*.8 + .1
    x[::4, 0, 0, 0], x[7, 0, 0, 0] = -1., 3.  # black in many images, one bright point
    lo, hi = find_input_range(TorchLoader(TensorDataset(x, torch.zeros(200).long()), 25))
    assert lo == -1. and hi == pytest.approx(3.4)
    lo, hi = find_input_range(TorchLoader(TensorDataset(x[:, :, 1:], torch.zeros(200).long()), 25))
    top = x[:, :, 1:].max().item()
    assert lo == x[:, :, 1:].min().item() > 0 and top < hi < top + .1


def test_measuring_moves_no_generator(tmp_path):
    "Neither the global ones nor those of the loaders; the order of the training images is that of a learner without PACT."
    def orders(cbs, loader, g):
        set_seed(5)
        if g is not None: g.manual_seed(5)
        learn = tensor_learner(tmp_path, loader, cbs=cbs)
        if cbs: learn.pact.alphas()
        seen = []

        class See(Callback):
            order = -50

            def before_batch(self): seen.append(self.learn.xb[0][:, 0, 0, 0].clone())
        learn.fit(2, 0., cbs=See())
        return torch.cat(seen)
    ds = tensors(1.).dataset
    g = torch.Generator()
    for make_loader, gen in ((lambda: DataLoader(ds, bs=16, shuffle=True, num_workers=0), None), (lambda: TorchLoader(ds, 16, shuffle=True), None),
                             (lambda: TorchLoader(ds, 16, shuffle=True, generator=g), g)):
        got = []
        for with_pact in (False, True):
            set_seed(5)
            got.append(orders([pact()] if with_pact else None, make_loader(), gen))
        assert torch.equal(*got)


def test_clipped_inputs_are_told_once(tmp_path):
    learn = tensor_learner(tmp_path, tensors(.3), tensors(1.), cbs=pact())
    with pytest.warns(UserWarning, match=r'6\d\.\d% of the input values of this validation pass lie outside the input grid, \[0, 0\.3'): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1)  # told
        learn = tensor_learner(tmp_path, tensors(.3), tensors(1.), cbs=pact(input_range=(0., 1.)))
        learn.fit(1)
    assert (grid(learn).lo, grid(learn).hi) == (0., 1.)
    learn = tensor_learner(tmp_path, tensors(1.), cbs=pact(input_range=(0., .5)))
    with pytest.warns(UserWarning, match=r'[45]\d\.\d% of the input values of this training pass.*input_range='): learn.fit(1)
    with pytest.raises(BadInput, match='needs a range'): PACTCallback(input_range=(0., 0.))


# ---- loaders and networks of other kinds

class Stream(IterableDataset):
    def __iter__(self): return ((torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(64))
    def __len__(self): return 64


@pytest.mark.parametrize('name,train', [
    ('torch', lambda: tensors(1.)), ('not square', lambda: tensors(1., size=(9, 17))), ('subset', lambda: TorchLoader(tensors(1.).dataset, 8, sampler=SubsetRandomSampler(range(5, 40)))),
    ('stream', lambda: TorchLoader(Stream(), 16)), ('fastai stream', lambda: DataLoader(Stream(), bs=16)), ('list', lambda: list(tensors(1.))), ('batch sampler', lambda: TorchLoader(tensors(1.).dataset, batch_sampler=BatchSampler(SequentialSampler(range(64)), 16, False)))])
def test_plain_torch_loaders(tmp_path, name, train):
    learn = tensor_learner(tmp_path, train(), cbs=PACTCallback(alpha_init=.02))
    assert grid(learn).lo == 0 and .9 < grid(learn).hi < 1.2
    learn.fit_one_cycle(2, 1e-2)
    assert len(learn.pact.alphas()) == 3 and len(learn.pact.alphas(learn.dls.valid)) == 3
    assert any(abs(a - .02) > 1e-5 for a in alphas(learn))
    learn.lr_find(num_it=8, show_plot=False)
    groups_ok(learn)


def test_a_batch_drawn_from_a_subset_holds_only_its_images():
    dl = TorchLoader(TensorDataset(torch.arange(64.)[:, None], torch.zeros(64)), 8, sampler=SubsetRandomSampler(range(5, 40)))
    x = torch.cat(_some_batches(dl, 8))
    assert sorted(x.flatten().tolist()) == list(range(5, 40))


def test_mlp_and_no_validation_images(tmp_path):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3))
    learn = tensor_learner(tmp_path, DataLoader(tensors(1.).dataset, bs=16), DataLoader([], bs=16), net=mlp, cbs=pact())
    learn.fit(1, 1e-2)
    assert len(learn.pact.alphas()) == 1 and abs(alphas(learn)[0] - START) > 1e-5
    learn = quiet(Learner(DataLoaders(tensors(1.)), small_net(1, 3), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=pact()))
    assert len(learn.pact.alphas()) == 3


# ---- fastai's own views

@pytest.mark.parametrize('model', [lambda: lenet5(), lambda: resnet20(n_in=1, size=28)], ids=['lenet5', 'resnet20'])
def test_summary_counts_every_parameter_and_names_the_optimizer(tmp_path, model):
    learn = make(tmp_path, pact(), model=model(), opt_func=ranger)
    text = learn.summary()
    n = sum(p.numel() for p in learn.model.parameters())
    assert f'Total params: {n:,}\n' in text and f'Total trainable params: {n:,}\n' in text
    assert 'partial' not in text and 'function ranger' in text and 'InputQuant' not in text
    floats = make(tmp_path, model=model()).summary()
    assert f'Total params: {n - len(pacts(learn.model)):,}\n' in floats


@pytest.mark.parametrize('order', [-20, 0])
def test_activation_statistics_have_a_row_a_layer(tmp_path, order):
    learn, stats = make(tmp_path, pact()), ActivationStats(with_hist=True)
    stats.order = order
    learn.fit(1, cbs=stats)
    assert len(stats.stats[0]) == len(quant_layers(learn.model)) + len(pacts(learn.model))
    assert all(len(o) == len(stats.stats) and np.isfinite(list(o)).all() for i in range(len(stats.stats[0])) for o in stats.layer_stats(i))
    stats.plot_layer_stats(0)
    plt.close('all')


@pytest.mark.parametrize('name', ['w_bits', 'a_bits'])
def test_more_than_two_bit_widths_are_refused(name):
    with pytest.raises(BadInput, match=f"{name} is .4, 2, 2.; give one number, or a pair"): PACTCallback(**{name: (4, 2, 2)})

def test_batches_without_a_tensor_are_refused():
    data = [dict(image=torch.zeros(1, 28, 28), label=i % 10) for i in range(8)]
    dl = TorchLoader(data, batch_size=4)
    with pytest.raises(BadInput, match='A batch of the learner.s data is a dict whose input is a dict'):
        Learner(DataLoaders(dl, dl), small_cnn(), loss_func=nn.CrossEntropyLoss(), cbs=PACTCallback())
