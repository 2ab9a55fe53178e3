"""The life of a `PACTCallback`: every way to add it, and everything that a fastai user does to a learner."""
import numpy as np, pytest, torch
from torch import nn

import qisal.data  # noqa: F401  (imports fastai without its warnings)
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *  # noqa: F403  (`fit_one_cycle`, `lr_find`)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD, OptimWrapper

from qisal.callback.pact import PACTCallback
from qisal.core import BadInput, set_seed
from qisal.data import get_dls
from qisal.models import lenet5, resnet20, small_cnn
from qisal.quant import ALPHA_MIN, PACT, compile_pact, has_compiler, pacts, quant_layers


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
    if where == 'fit': learn.fit(1, 1e-2, cbs=pact())
    elif where == 'one_cycle': learn.fit_one_cycle(1, 1e-2, cbs=pact())
    else: learn.fit_one_cycle(1, 1e-2)
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
    assert learn.pact is cb and cb not in learn.cbs and len(quant_layers(learn.model)) == 5
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
