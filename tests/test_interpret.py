"""The figures: returned, readable, distinguishable in grey; and the interpretation of learners, ours and fastai's own."""
import itertools

import numpy as np, pandas as pd, pytest, torch
from torch import nn
import qisal.data
import matplotlib, matplotlib.pyplot as plt
from fastai.learner import Learner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from qisal.core import BITS, BadInput
from qisal.data import get_dls, sample_arrays
from qisal.callback import saliency as callback
from qisal.callback.saliency import StudyFigure, film_strip, plain_text, study_style
from qisal.interpret import (BITS_FALLING, SaliencyInterpretation, accuracy_by_setting, history_table, layer_labels, overlay, plot_accuracy_vs_bits, plot_alphas,
                             plot_history, plot_masking_curves, plot_saliency_grid, readable, robust_scale, series_styles, to_picture)
from qisal.interpret import _columns
from qisal.metrics import masking_curve, mean_interval, wilson_interval

RNG = np.random.default_rng(0)


def curve(name='gradient', order='morf'):
    df = pd.DataFrame(dict(frac=np.arange(10)/10, accuracy=np.linspace(.99, .1, 10)))
    df.attrs = dict(auc=.5, attribution=name, order=order)
    return df


def runs(datasets=('mnist',), bits=('32', '4', '4/2', '2'), seeds=3):
    return pd.DataFrame([dict(dataset=d, bits=b, guided=g, seed=s, n_test=1000, accuracy=.98 - .01*i - .005*g + .002*s)
                         for d in datasets for i, b in enumerate(bits) for g in (False, True) for s in range(seeds)])


ALPHAS = pd.DataFrame(dict(layer=['layer1.0.conv1', 'layer2.0.conv2', 'fc'], bits=[8, 4, 2], alpha=[6., 2.5, .01], clipped=[0., .031, .42], touched=[False, False, True]))
HISTORY = pd.DataFrame(dict(epoch=[1, 2, 3], train_loss=[2., 1., .5], valid_loss=[1.8, 1., .6], kl=[.3, .2, .1], accuracy=[.5, .8, .9], time=['00:01']*3))
MAPS = {f'{b}\n{g}': RNG.random((4, 28, 28)) for b in ('fp32', '4-bit', '4/2', '2-bit') for g in ('plain', 'guided')}
IMAGES = RNG.integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
FIGURES = dict(
    curves=lambda: plot_masking_curves({'fp32': curve(), '4-bit, guided': curve(), '4/2': curve(), '2-bit, guided': curve(), 'random control': curve('random')}),
    many=lambda: plot_masking_curves({f'{b}, {g}': curve() for b in BITS for g in ('plain', 'guided')}),
    grid=lambda: plot_saliency_grid(IMAGES, MAPS, labels=['T-shirt/top', 'Trouser', 'Pullover', 'Ankle boot']),
    captions=lambda: plot_saliency_grid(IMAGES, {'fp32': MAPS['fp32\nplain']}, labels=list('7210'), captions={'fp32': ['says 7']*4}),
    alphas=lambda: plot_alphas(ALPHAS),
    accuracy=lambda: plot_accuracy_vs_bits(runs()),
    all_bits=lambda: plot_accuracy_vs_bits(runs(('mnist', 'fashion_mnist'), BITS, 1)),
    history=lambda: plot_history(HISTORY),
    overlay=lambda: overlay(IMAGES[0], MAPS['fp32\nplain'][0], title='Ankle boot (99.1%)'))


def drawn(fig):
    "Visible texts with their boxes in pixels."
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    r = canvas.get_renderer()
    for t in fig.findobj(Text):
        on = t.get_visible() and t.get_text().strip() and t.get_figure() is not None
        ax = t.axes
        if on and (ax is None or ax.get_visible() and (ax.axison or t in (ax.title,))):
            yield t, t.get_window_extent(r)


@pytest.mark.parametrize('name', FIGURES)
def test_figures_are_readable(name):
    before = plt.get_fignums()
    fig = FIGURES[name]()
    assert isinstance(fig, Figure) and plt.get_fignums() == before
    assert fig.get_figwidth() <= 8.01 and fig.dpi == 100
    ticks = {t for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for k in axis.get_major_ticks() for t in (k.label1, k.label2)}
    live = {t for ax in fig.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)
            for k, v in zip(axis.get_major_ticks(), axis.get_majorticklocs()) if min(axis.get_view_interval()) <= v <= max(axis.get_view_interval()) for t in (k.label1,)}
    texts = [(t, b) for t, b in drawn(fig) if t not in ticks or t in live]
    assert all(t.get_fontsize() >= 9 for t, _ in texts), [(t.get_text(), t.get_fontsize()) for t, _ in texts if t.get_fontsize() < 9]
    whole = fig.bbox
    for t, b in texts: assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= whole.x1 + 1 and b.y1 <= whole.y1 + 1, f'{t.get_text()!r} leaves the figure'
    for (t, a), (u, b) in itertools.combinations(texts, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f'{t.get_text()!r} covers {u.get_text()!r}'


def test_every_plot_names_its_axes():
    for name in ('curves', 'accuracy', 'history', 'alphas'):
        fig = FIGURES[name]()
        assert all(ax.get_xlabel() and (ax.get_ylabel() or name == 'alphas' or i) for i, ax in enumerate(fig.axes)), name
        assert fig._suptitle or all(ax.get_title() for ax in fig.axes)
    ax = FIGURES['curves']().axes[0]
    assert 'most relevant first' in ax.get_xlabel() and '%' in ax.get_xlabel() and '%' in ax.get_ylabel()


def test_lines_differ_without_colour():
    for n in (2, 8, 9):
        styles = series_styles(n)
        assert len({(s['linestyle'], s['marker']) for s in styles}) == n and len({s['color'] for s in styles}) == n
    lines = FIGURES['curves']().axes[0].lines
    assert lines[-1].get_linestyle() == '--' and lines[-1].get_color() == '.45'
    assert lines[0].get_color() != lines[1].get_color()


def test_plots_show_the_numbers():
    df = curve()
    line = plot_masking_curves({'a': df}).axes[0].lines[0]
    assert line.get_xdata().tolist() == df.frac.tolist() and line.get_ydata().tolist() == df.accuracy.tolist()
    assert 'least relevant first' in plot_masking_curves({'a': curve(order='lerf')}).axes[0].get_xlabel()
    fig = plot_saliency_grid(IMAGES, {'a': MAPS['fp32\nplain']})
    assert np.allclose(fig.axes[1].images[0].get_array(), robust_scale(MAPS['fp32\nplain'])[0])
    assert np.allclose(fig.axes[2].images[0].get_array(), IMAGES[1, ..., 0]/255)
    texts = [t.get_text() for t in plot_alphas(ALPHAS).axes[0].texts]
    assert texts == ['6.00,  8 bit', '2.50,  4 bit', '0.01,  2 bit'] and 'lower bound' in plot_alphas(ALPHAS).axes[0].get_title()
    assert [t.get_text() for t in plot_alphas(ALPHAS).axes[1].texts] == ['0.0%', '3.1%', '42.0%']


def test_intervals_by_setting():
    three, one = accuracy_by_setting(runs()), accuracy_by_setting(runs(seeds=1))
    assert three.bits.tolist() == ['32', '32', '4', '4', '4/2', '4/2', '2', '2'] and (three.runs == 3).all() and (three.interval == 'seeds').all()
    assert three.iloc[0][['accuracy', 'low', 'high']].tolist() == pytest.approx(mean_interval([.98, .982, .984]))
    assert one.iloc[0][['low', 'high']].tolist() == pytest.approx(wilson_interval(980, 1000)) and (one.interval == 'images').all()
    bare = accuracy_by_setting(runs(seeds=1).drop(columns='n_test'))
    assert (bare.interval == 'none').all() and bare.low.isna().all()
    assert sorted(BITS_FALLING) == sorted(BITS)
    assert 'Wilson' in plot_accuracy_vs_bits(runs(seeds=1)).axes[0].get_xlabel() and 'interval' not in plot_accuracy_vs_bits(runs(seeds=1).drop(columns='n_test')).axes[0].get_xlabel()
    only = runs()
    assert len(plot_accuracy_vs_bits(only[~only.guided]).axes[0].containers) == 1


def test_pictures_and_scales():
    rgb = torch.rand(3, 5, 6)
    assert np.allclose(to_picture(rgb), rgb.permute(1, 2, 0)) and to_picture(torch.rand(1, 5, 6)).shape == (5, 6)
    assert np.allclose(to_picture((rgb*255).to(torch.uint8)), (rgb*255).to(torch.uint8).permute(1, 2, 0)/255)
    p = to_picture(rgb*4 - 2)
    assert p.min() == 0 and p.max() == 1
    for bad in (np.zeros((5, 6, 2)), np.zeros(5), np.zeros((0, 5, 3))):
        with pytest.raises(BadInput, match='shape'): to_picture(bad)
    m = RNG.standard_normal((2, 10, 10))
    s = robust_scale(m)
    assert np.allclose(s, np.clip(np.abs(m)/np.quantile(np.abs(m), .99, axis=(1, 2), keepdims=True), 0, 1))
    one = np.zeros((1, 30, 30)); one[0, 3, 3] = 2
    assert robust_scale(one).max() == 1 and robust_scale(one*0).max() == 0
    for bad in (m[0], m*np.nan):
        with pytest.raises(BadInput): robust_scale(bad)


@pytest.mark.parametrize('make, says', [
    (lambda: plot_masking_curves({}), 'no curves'), (lambda: plot_masking_curves({'a': HISTORY}), 'frac'),
    (lambda: plot_saliency_grid(IMAGES, {}), 'no maps'), (lambda: plot_saliency_grid(IMAGES[:0], MAPS), 'no images'),
    (lambda: plot_saliency_grid(IMAGES[:2], MAPS), '4 maps for 2'), (lambda: plot_saliency_grid(IMAGES, MAPS, labels=['a']), '1 labels'),
    (lambda: plot_saliency_grid(IMAGES, MAPS, captions={'fp3': ['a']*4}), 'column'),
    (lambda: plot_alphas(ALPHAS[:0]), '0 rows'), (lambda: plot_alphas(ALPHAS.drop(columns='clipped')), 'clipped'),
    (lambda: plot_accuracy_vs_bits(runs().drop(columns='guided')), 'guided'), (lambda: plot_accuracy_vs_bits(runs().assign(bits='5')), 'bits'),
    (lambda: plot_history(HISTORY[['epoch']]), 'empty'), (lambda: plot_history(None), 'no training history'),
    (lambda: overlay(IMAGES[0], np.zeros((3, 3))), 'same size')])
def test_bad_input(make, says):
    with pytest.raises(BadInput, match=says): make()


@pytest.fixture(scope='module')
def learn():
    torch.manual_seed(0)
    dls = get_dls('mnist', sample=True, device='cpu')
    out = Learner(dls, nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)))
    with out.no_bar(), out.no_logging(): out.fit(2, 3e-3)
    out.kept = history_table(out)
    return out


def test_history_of_a_learner(learn):
    assert learn.kept.columns.tolist() == ['epoch', 'train_loss', 'valid_loss'] and learn.kept.epoch.tolist() == [1, 2]
    assert len(plot_history(learn.kept).axes) == 1
    with learn.no_bar(): learn.validate()
    with pytest.raises(BadInput, match='right after fit'): plot_history(learn)


def test_interpretation_of_our_learner(learn):
    test = learn.dls.test
    with learn.no_bar(): interp = SaliencyInterpretation.from_learner(learn, dl=test)
    with torch.no_grad(): logits = learn.model(test.dataset[torch.arange(1000)][0])
    y = test.dataset.y
    losses = nn.functional.cross_entropy(logits, y, reduction='none')
    want = losses.topk(5)
    got, idxs = interp.top_losses(5)
    assert torch.allclose(torch.as_tensor(got), want.values, atol=1e-5) and torch.equal(torch.as_tensor(idxs), want.indices)
    fig = interp.plot_top_losses(5)
    titles = [ax.get_title() for ax in fig.axes[:5]]
    probs = logits.softmax(1)
    assert titles == [f'{int(probs[i].argmax())} / {int(y[i])}\n{losses[i]:.2f} / {probs[i].max():.0%}' for i in want.indices.tolist()]
    assert isinstance(fig, Figure) and 'predicted class' in fig._suptitle.get_text()
    third = interp.plot_top_losses([2], explain='actual', attribution='integrated_gradients', n_steps=4)
    assert third.axes[0].get_title() == titles[2] and 'actual class' in third._suptitle.get_text()
    small = interp.plot_top_losses(2, largest=False)
    assert float(small.axes[0].get_title().split('\n')[1].split(' / ')[0]) == pytest.approx(losses.min().item(), abs=.01)
    pd.testing.assert_frame_equal(interp.masking_curve(fracs=(0, .2)), masking_curve(learn.model, test, fracs=(0, .2)))
    for kw in (dict(k=0), dict(k=1001), dict(k=[1000]), dict(k=[]), dict(k=2, explain='true'), dict(k=2, attribution='nope')):
        with pytest.raises(BadInput): interp.plot_top_losses(**kw)


def test_confusion_matrix_of_our_learner(learn):
    test = learn.dls.test
    with learn.no_bar(): interp = SaliencyInterpretation.from_learner(learn, dl=test)
    assert list(interp.vocab) == list('0123456789')
    with learn.no_bar(): cm = interp.confusion_matrix()
    with torch.no_grad(): pred = learn.model(test.dataset[torch.arange(1000)][0]).argmax(1)
    want = np.zeros((10, 10), int)
    for t, p in zip(test.dataset.y.tolist(), pred.tolist()): want[t, p] += 1
    assert (cm == want).all()
    before = plt.get_fignums()
    fig = interp.plot_confusion_matrix(normalize=True)
    assert isinstance(fig, Figure) and plt.get_fignums() == before and fig.axes[0].get_ylabel() == 'Actual class'
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == list('0123456789')


def test_training_loader_can_be_interpreted_without_disturbing_it(learn):
    passes = learn.dls.train.passes
    with learn.no_bar(): interp = SaliencyInterpretation.from_learner(learn, ds_idx=0)
    assert len(interp.losses) == 1800
    x, y, _ = interp.take([3, 1])
    assert torch.equal(x, learn.dls.train.dataset[torch.tensor([3, 1])][0]) and learn.dls.train.passes == passes


def test_any_fastai_vision_learner(tmp_path):
    from PIL import Image
    from fastai.data.transforms import Normalize
    from fastai.vision.augment import aug_transforms
    from fastai.vision.data import ImageDataLoaders, imagenet_stats
    arrays = sample_arrays('fashion_mnist')
    for i in np.flatnonzero(arrays.y_train < 2)[:30]:
        (tmp_path/'ab'[arrays.y_train[i]]).mkdir(exist_ok=True)
        Image.fromarray(arrays.x_train[i, ..., 0]).save(tmp_path/'ab'[arrays.y_train[i]]/f'{i:04}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.4, seed=0, bs=4, num_workers=0, device='cpu', batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 5, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)))
    with learn.no_bar(): interp = SaliencyInterpretation.from_learner(learn)
    assert list(interp.vocab) == ['a', 'b']
    losses, idxs = interp.top_losses(3)
    x, y, probs = interp.take(idxs)
    assert torch.allclose(-probs.gather(1, y[:, None])[:, 0].log(), torch.as_tensor(losses).float(), atol=1e-4)
    fig = interp.plot_top_losses(3)
    assert fig.axes[0].images[0].get_array().shape == (28, 28, 3) and fig.axes[0].get_title()[0] in 'ab'
    from qisal.interpret import _pictures
    file = dls.valid.items[int(idxs[0])]
    assert np.abs(to_picture(_pictures(interp.dl, x)[0])[..., 0] - np.asarray(Image.open(file))/255).max() < .01  # back to the file's pixels
    assert len(interp.masking_curve(fracs=(0, .5))) == 2
    with learn.no_bar(): assert interp.confusion_matrix().sum() == 12
    assert isinstance(interp.plot_confusion_matrix(), Figure)


NAMES = ['$$', '$1 and $2', '$', r'\$', '_hidden', 'a & b_c^d', '100 %', '{x}', 'caf\xe9', 'no \udcff utf-8']
TEX = {'text.usetex': True, 'text.parse_math': False}  # what a user's matplotlibrc may say


def pixels(fig):
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


@pytest.mark.parametrize('name', NAMES)
def test_a_name_is_drawn_as_it_is(name):
    "Pixel by pixel what matplotlib draws with formulas and LaTeX switched off."
    with plt.rc_context(TEX):
        ours = StudyFigure(figsize=(3, 1))
        ours.text(.1, .4, plain_text(name))
        got = pixels(ours)
    theirs = Figure(figsize=(3, 1))
    theirs.text(.1, .4, name.replace('\udcff', '?'), parse_math=False, usetex=False)
    shown = pixels(theirs)
    if name.startswith('_'): assert np.abs((got < 255).sum() - (shown < 255).sum()) < 40  # a space of no width may move it by part of a pixel
    else: assert (got == shown).all()
    assert (shown < 255).any()


def test_every_figure_takes_every_name(tmp_path):
    with plt.rc_context(TEX):
        figs = dict(curves=plot_masking_curves({o: curve() for o in NAMES}, title='$$', images='$x images$'),
                    grid=plot_saliency_grid(IMAGES, {o: MAPS['fp32\nplain'] for o in NAMES[:3]}, labels=NAMES[:4], captions={'$$': NAMES[:4]}, title='$'),
                    alphas=plot_alphas(ALPHAS.assign(layer=NAMES[:3]), title='$$'), accuracy=plot_accuracy_vs_bits(runs(('$$', '$1')), title='$$'),
                    history=plot_history(HISTORY.rename(columns=dict(kl='$$')), title='$$'), overlay=overlay(IMAGES[0], MAPS['fp32\nplain'][0], title='$$'),
                    strip=film_strip(np.zeros((2, 8, 8, 1)), np.random.rand(3, 2, 8, 8), [1, 2, 3], ['$$', '$1'], '$$'))
        for name, fig in figs.items():
            fig.savefig(tmp_path/f'{name}.png', bbox_inches='tight')
            assert isinstance(fig, StudyFigure), name
    [legend] = figs['curves'].legends
    assert len(legend.get_texts()) == len(NAMES)


def test_missing_characters_are_told_once(monkeypatch, recwarn):
    monkeypatch.setattr(callback, '_missing_told', False)
    for _ in range(2):
        fig = plot_saliency_grid(IMAGES[:2], {'a': MAPS['fp32\nplain'][:2]}, labels=['\u4e2d\u6587', '\u732b'])
        pixels(fig)
        pixels(fig)
    told = [str(w.message) for w in recwarn.list if issubclass(w.category, UserWarning)]
    assert len(told) == 1 and 'DejaVu Sans lacks characters' in told[0] and 'font.family' in told[0]


def test_other_warnings_while_drawing_come_through():
    class Loud(Text):
        def draw(self, renderer):
            import warnings
            warnings.warn('mine')
            super().draw(renderer)
    fig = StudyFigure()
    fig.add_artist(Loud(.5, .5, 'x'))
    with pytest.warns(UserWarning, match='mine'): pixels(fig)


def test_curves_say_what_was_measured():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, y = torch.randn(30, 1, 8, 8), torch.arange(30) % 4
    a, b = masking_curve(net, (x, y)), masking_curve(net, (x[:20], y[:20]))
    said = lambda curves, **kw: plot_masking_curves(curves, **kw).axes[0].get_ylabel()
    assert said({'a': a}) == 'accuracy (% of 30 images)' and said({'a': a}, images='validation images') == 'accuracy (% of 30 validation images)'
    assert said({'a': a, 'b': b}) == 'accuracy (% of the images)'  # not the same number
    df = curve()
    df.attrs.update(n=1000, blank=612)
    labels = [t.get_text() for t in plot_masking_curves({'gradcam, road': df, 'random': curve('random'), 'my_own': curve()}).legends[0].get_texts()]
    assert labels == ['Grad-CAM, ROAD fill (area 0.50, 612 of 1,000 maps blank)', 'random (area 0.50)', 'my_own (area 0.50)']


def test_a_legend_names_only_what_is_drawn():
    only = runs()[lambda d: ~d.guided]
    assert not plot_accuracy_vs_bits(only).legends
    names = lambda fig: [t.get_text() for t in fig.legends[0].get_texts()]
    assert names(plot_accuracy_vs_bits(runs()[lambda d: d.guided])) == ['with saliency guidance']
    mixed = pd.concat([runs(('a',)), only.assign(dataset='b')])  # the last panel has one series only
    assert names(plot_accuracy_vs_bits(mixed)) == ['without guidance', 'with saliency guidance']


def test_codes_become_words_and_layers_get_a_place():
    assert readable('smoothgrad, road') == 'SmoothGrad, ROAD fill' and readable('ce') == 'cross-entropy' and readable('roadster') == 'roadster'
    assert layer_labels(['1', '3', 'relu_0', 'layer1.0.conv1', 'body.2', 'act']) == ['1. activation (1)', '2. activation (3)', '3. activation (relu_0)', 'layer1.0.conv1', 'body.2', 'act']
    lines = [o.get_label() for ax in plot_history(HISTORY).axes for o in ax.lines]
    assert lines == ['train loss', 'valid loss', 'KL divergence', 'accuracy']


def test_one_style():
    colors = study_style()['axes.prop_cycle'].by_key()['color']
    assert [s['color'] for s in series_styles(9)] == colors[:9] and len(set(colors)) == 9
    with plt.rc_context({'axes.facecolor': 'black', 'font.size': 30}): assert plot_history(HISTORY).axes[0].get_facecolor() == (1, 1, 1, 1)


def test_no_panel_is_left_alone():
    assert [_columns(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)] == [1, 2, 3, 2, 3, 3, 4, 4, 3, 4, 4, 4]
    for n in (*range(2, 13), 14, 15, 16): assert n % _columns(n) != 1, n


def test_blank_and_broken_maps_are_marked():
    maps = np.stack([MAPS['fp32\nplain'][0], np.zeros((28, 28)), np.ones((28, 28)), MAPS['fp32\nplain'][1]])
    fig = plot_saliency_grid(IMAGES, {'a': maps})
    assert [[t.get_text() for t in ax.texts] for ax in fig.axes[1:8:2]] == [[], ['blank'], ['blank'], []]
    strip = film_strip(np.zeros((1, 8, 8, 1)), np.stack([np.zeros((1, 8, 8)), np.full((1, 8, 8), np.nan), np.random.rand(1, 8, 8)]), [1, 2, 3], ['x'])
    assert [[t.get_text() for t in ax.texts] for ax in strip.axes[1:]] == [['blank'], ['not finite'], []]


def test_pictures_of_any_shape_and_dtype():
    wide = torch.rand(3, 6, 11)
    assert np.allclose(to_picture(wide.bfloat16()), to_picture(wide), atol=.01)
    assert np.allclose(robust_scale(wide.bfloat16()), robust_scale(wide), atol=.02)
    assert overlay(wide, wide[0].half(), 'wide').axes[1].images[0].get_array().shape == (6, 11, 3)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), None], ids=['torch', 'fastai'])
def test_interpretation_of_torchs_own_loaders(loss):
    "Shuffled, not square, without a vocabulary, and with a loss that knows no activation."
    from torch.utils.data import DataLoader as TorchLoader, TensorDataset
    from fastai.data.core import DataLoaders
    from fastai.losses import CrossEntropyLossFlat
    torch.manual_seed(0)
    x, y = torch.randn(50, 1, 6, 9), torch.arange(50) % 5
    dls = DataLoaders(TorchLoader(TensorDataset(x, y), batch_size=8, shuffle=True), TorchLoader(TensorDataset(x, y), batch_size=8, shuffle=True))
    learn = Learner(dls, nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(112, 5)), loss_func=loss or CrossEntropyLossFlat())
    with learn.no_bar(): interp = SaliencyInterpretation.from_learner(learn)
    with torch.no_grad(): logits = learn.model(x)
    assert torch.allclose(torch.as_tensor(interp.losses).float(), nn.functional.cross_entropy(logits, y, reduction='none'), atol=1e-5)
    got, labels, probs = interp.take([7, 3])
    assert torch.equal(got, x[[7, 3]]) and labels.tolist() == [2, 3] and torch.allclose(probs, logits[[7, 3]].softmax(1), atol=1e-5)
    with learn.no_bar(): cm = interp.confusion_matrix()
    want = np.zeros((5, 5), int)
    for t, p in zip(y.tolist(), logits.argmax(1).tolist()): want[t, p] += 1
    assert (cm == want).all() and list(interp.vocab) == list('01234')
    assert len(interp.plot_top_losses(4).axes) == 5 and isinstance(interp.plot_confusion_matrix(), StudyFigure)
    pd.testing.assert_frame_equal(interp.masking_curve('random', fracs=(0, .5)), masking_curve(learn.model, (x, y), 'random', fracs=(0, .5)))


def test_class_names_in_an_interpretation(learn):
    with learn.no_bar(): interp = SaliencyInterpretation.from_learner(learn, dl=learn.dls.test)
    interp.vocab = ['$$', '$1', *'23456789']
    pixels(interp.plot_top_losses(3))
    fig = interp.plot_confusion_matrix()
    pixels(fig)
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()][:3] == [r'\$\$', r'\$1', '2'] and list(interp.vocab)[0] == '$$'


def test_settings_made_inside_a_style_stay():
    "A notebook's backend sets `interactive` when it is first used, perhaps inside our function; rc_context would undo that."
    was, size = plt.isinteractive(), plt.rcParams['font.size']
    try:
        with pytest.raises(KeyError, match='mine'):
            with callback.applied({'font.size': 99, 'text.usetex': True}):
                matplotlib.interactive(not was)
                raise KeyError('mine')
        assert plt.isinteractive() is not was and plt.rcParams['font.size'] == size and not plt.rcParams['text.usetex']
    finally: matplotlib.interactive(was)


def test_guidance_may_be_text_as_a_table_with_gaps_has_it():
    "`bool('False')` is True: plain networks would be drawn as guided."
    df = runs(bits=('4', '2'), seeds=1)
    text = df.assign(guided=df.guided.map(str))
    assert accuracy_by_setting(text).equals(accuracy_by_setting(df))
    names = [[c.get_label() for c in plot_accuracy_vs_bits(t).axes[0].containers] for t in (df, text)]
    assert names == [['without guidance', 'with saliency guidance']]*2

@pytest.mark.parametrize('value', [None, np.nan, 'on', 2], ids=repr)
def test_guidance_that_is_neither_is_refused(value):
    "A row without it was left out in silence."
    df = runs(bits=('4',), seeds=1).astype({'guided': object})
    df.at[1, 'guided'] = value
    with pytest.raises(BadInput, match='guided is .*; it must be True or False in each row'): accuracy_by_setting(df)

@pytest.mark.parametrize('loss', [None, nn.CrossEntropyLoss()], ids=['fastai', 'torch'])
def test_the_classification_report_of_our_loaders(capsys, loss):
    torch.manual_seed(0)
    learn = Learner(get_dls('mnist', sample=True, n_train=100, batch_size=50), nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), loss_func=loss)
    found = SaliencyInterpretation.from_learner(learn)
    capsys.readouterr()
    found.print_classification_report()
    told = capsys.readouterr().out
    right = np.trace(found.confusion_matrix())/len(learn.dls.valid_ds)
    row = next(o.split() for o in told.splitlines() if 'accuracy' in o)
    assert row[1:] == [f'{right:.2f}', str(len(learn.dls.valid_ds))]
    assert [o.split()[0] for o in told.splitlines()[2:12]] == [str(o) for o in range(10)]
