import copy, itertools, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
import qisal.data
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelBackwardException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
import fastai.callback.progress
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation, BnFreeze
import fastai.callback.schedule
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import TensorCategory, TensorImage
from qisal.callback.saliency import SaliencyMaskingCallback, LossParts, masked_kl, no_running_stats
from qisal.core import BadInput, set_seed
import sys, pathlib
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reference_saliency as ref

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


class Net(nn.Module):
    "Convolutions, batch norm, ReLU, dropout: everything that has state or chance in training mode."
    def __init__(self, n_in=1, norm=nn.BatchNorm2d, p=.3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(n_in, 6, 3, padding=1), norm(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(p),
                                  nn.Conv2d(6, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Flatten(), nn.Dropout(p))
        self.head = nn.Linear(8*16, 4)
    def forward(self, x): return self.head(self.body(x))


class Momentumless(nn.BatchNorm2d):
    def __init__(self, n): super().__init__(n, momentum=None)


def data(n=32, n_in=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = torch.randn(n, n_in, 8, 8, generator=g)*.5
    for i in range(n): x[i, :, y[i]*2:y[i]*2 + 2] += 1.5
    return x, y


def loaders(x, y, bs=8, vbs=16, wrap=lambda b: b):
    ds = list(zip(x, y))
    def collate(items): return wrap((torch.stack([o[0] for o in items]), torch.stack([o[1] for o in items])))
    return DataLoaders(DataLoader(ds, bs=bs, create_batch=collate, num_workers=0), DataLoader(ds, bs=vbs, create_batch=collate, num_workers=0), device=torch.device('cpu'))


def quiet_learner(model=None, cbs=None, dls=None, loss=None, **kw):
    learn = Learner(dls or loaders(*data()), model if model is not None else Net(), loss_func=loss or CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy,
                    cbs=cbs, lr=.05, wd=0., **kw)
    learn.remove_cbs(list(learn._grab_cbs(fastai.callback.progress.ProgressCallback)))
    learn.logger = lambda *a: None
    return learn


class Spy(Callback):
    "Keeps each training batch's loss, gradients and mode, and stops after `stop` batches."
    order = 55
    run_valid = False
    def __init__(self, stop=1): self.stop, self.seen = stop, []
    def before_batch(self): torch.manual_seed(7)  # fastai's loader draws from torch's generator before each pass
    def after_backward(self):
        self.seen.append(dict(loss=float(self.learn.loss), grads={k: p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None}))
    def after_batch(self):
        if self.seen: self.seen[-1].update(loss=float(self.learn.loss), buffers=ref.buffers(self.model))
        if len(self.seen) >= self.stop: raise CancelFitException


def one_step(model, cb, xb, yb, extra=(), **kw):
    spy = Spy()
    learn = quiet_learner(model, [cb, spy, *extra], loaders(xb, yb, bs=len(xb)), **kw)
    learn.fit(1)
    return spy.seen[0], learn


def close(a, b, eps=1e-5):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], atol=eps, rtol=1e-5, msg=lambda m: f'{k}: {m}')


OPTIONS = [dict(), dict(signed=False), dict(fill='mean'), dict(fill='corner'), dict(fill=.3), dict(frac=.3, lam=.4), dict(kl_target='detached'),
           dict(saliency_pass='eval'), dict(score='log_prob'), dict(update_bn=True), dict(saliency_pass='eval', fill='mean', signed=False, kl_target='detached')]


@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: ','.join(f'{k}={v}' for k, v in o.items()) or 'default')
@pytest.mark.parametrize('n_in,norm', [(1, nn.BatchNorm2d), (3, Momentumless)])
def test_exact_mode_is_the_reference(options, n_in, norm):
    torch.manual_seed(1)
    model = Net(n_in, norm)
    twin, (xb, yb) = copy.deepcopy(model), data(12, n_in)
    got, _ = one_step(model, SaliencyMaskingCallback(**options), xb, yb)
    torch.manual_seed(7)
    want = ref.step(twin.train(), xb, yb, nn.CrossEntropyLoss(), **options)
    assert abs(got['loss'] - want['loss']) < 1e-5 and want['kl'] > 1e-3
    close(got['grads'], want['grads'])
    close(got['buffers'], want['buffers'])
