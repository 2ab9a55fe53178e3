"Specs: numbers for names, fields that are younger than a stored run, batches that fit."
import io, json, os

import numpy as np, pandas as pd, pytest
from PIL import Image

from qisal.core import BITS, BadInput, RunSpec, as_bits, complete_fields, fitting_batch, lay_over

FOUR = (4, 4., '4', '4.0', ' 4', np.int64(4), np.uint8(4), np.float32(4))

@pytest.mark.parametrize('value', FOUR, ids=repr)
def test_bits_may_be_numbers(value):
    spec = RunSpec(bits=value)
    assert as_bits(value) == '4' and spec == RunSpec(bits='4') and spec.run_id == 'mnist-small_cnn-b4-plain-s0' and spec.fingerprint == RunSpec(bits='4').fingerprint

@pytest.mark.parametrize('value', [4.5, '5', True, None, float('nan'), float('inf'), 'four', (4,)], ids=repr)
def test_what_names_no_bits_is_refused(value):
    with pytest.raises(BadInput, match='bits .* is unknown; allowed: 32, 8, 4'): RunSpec(bits=value)

@pytest.mark.parametrize('value', FOUR, ids=repr)
def test_bits_may_be_numbers_in_policies(value):
    from qisal.quant import BitPolicy, bit_policy
    assert bit_policy(value, value) == bit_policy('4', 4) == BitPolicy((value, value), (value, value), value)
    assert all(type(o) is int for o in (*BitPolicy((value, value)).early, BitPolicy(ends=value).ends))

def test_bits_may_be_numbers_in_a_grid_an_override_and_a_table():
    from qisal.interpret import accuracy_by_setting
    from qisal.quant import _override
    from qisal.run import grid
    assert [o.bits for o in grid(bits=[32, 4., '2.0'], guided=['off'])] == ['32', '4', '2']
    for v in FOUR: assert _override('a', (8, 8), {'*': v}) == (4, 4)
    assert _override('a', (8, 8), {'*': '32.0'}) == (32, 32)
    df = pd.read_csv(io.StringIO('bits,guided,accuracy\n4,False,.9\n4,True,.8\n32,False,.95\n'))
    assert accuracy_by_setting(df).bits.tolist() == ['32', '4', '4']

def test_a_spec_survives_a_csv_file():
    "Integers come back as numpy's, whole floats too; the JSON and the fingerprint are the same."
    spec = RunSpec(dataset='folder:photos', bits='2', seed=7, epochs=3, n_train=100, batch_size=16, size=48, first_last_bits=4, frac=.25, lr=.01)
    df = pd.read_csv(io.StringIO(pd.DataFrame([spec.to_dict()] * 2).drop(columns='attributions').to_csv(index=False)))
    for row in (df.iloc[0].to_dict(), df.astype({o: float for o in ('seed', 'epochs', 'n_train', 'batch_size', 'size', 'first_last_bits', 'bits')}).iloc[0].to_dict()):
        again = RunSpec.from_dict(row)
        assert again == spec and json.loads(again.to_json()) == json.loads(spec.to_json()) and again.fingerprint == spec.fingerprint

@pytest.mark.parametrize('field', ['seed', 'epochs', 'n_train', 'batch_size', 'first_last_bits', 'lr', 'frac', 'lam', 'fill', 'mask_fill', 'guided'])
def test_numpy_values_can_be_written(field):
    old = getattr(RunSpec(), field)
    value = np.bool_(True) if field == 'guided' else np.float32(.5) if isinstance(old, (float, str)) else np.int64(8)
    spec = RunSpec(**{field: value})
    assert getattr(RunSpec.from_dict(json.loads(spec.to_json())), field) == value and len(spec.fingerprint) == 64

# ---------------------------------------------------------------- fields that came later
OLD_RUN = dict(dataset='mnist', bits='32', guided=True, seed=0, arch='small_cnn', epochs=5, n_train=None, sample=False, batch_size=128, lr=.002, valid_pct=.1, weight_quantizer='sawb',
    per_channel=False, first_last_bits=8, frac=.5, fill='random', lam=1., signed=True, mode='exact', attributions=['gradient', 'random'], mask_fill='corner')

def test_a_run_from_before_size_keeps_its_name_and_its_meaning():
    "The name was computed by the library that knew no `size`."
    spec = RunSpec.from_dict(OLD_RUN)
    assert spec.run_id == 'mnist-small_cnn-fp32-guided-s0-19eabf99' and spec.size is None
    old = RunSpec.from_dict({**OLD_RUN, 'dataset': 'folder:photos'})
    assert old.size == 32 and old.run_id == 'photos-small_cnn-fp32-guided-s0-60a83e06' and complete_fields({**OLD_RUN, 'size': 64})['size'] == 64
    assert len({RunSpec.from_dict({**OLD_RUN, 'dataset': 'folder:photos', 'size': o}).run_id for o in (None, 28, 32, 64)}) == 4

def test_sizes():
    assert RunSpec(dataset='folder:photos').size is None and RunSpec(dataset='folder:photos', size=96.).size == 96
    for bad in (7, 1025, 9.5, '64', True):
        with pytest.raises(BadInput, match='size is'): RunSpec(dataset='folder:photos', size=bad)
    with pytest.raises(BadInput, match='size is for folder:PATH only, not for cifar10'): RunSpec(dataset='cifar10', size=32)

def test_size_fits_the_network():
    assert RunSpec(dataset='folder:photos', size=8).size == 8 and RunSpec(dataset='folder:photos', arch='lenet5', size=12).size == 12
    with pytest.raises(BadInput, match='size is 8, but lenet5 needs 12 pixels or more'): RunSpec(dataset='folder:photos', arch='lenet5', size=8)

def test_background_is_for_folders():
    assert RunSpec(dataset='folder:a').fingerprint != RunSpec(dataset='folder:a', background='black').fingerprint
    with pytest.raises(BadInput, match="background 'grey' is unknown; allowed: white, black"): RunSpec(dataset='folder:a', background='grey')
    with pytest.raises(BadInput, match='background is for folder:PATH only'): RunSpec(background='black')

def test_names_are_utf8():
    with pytest.raises(BadInput, match=r"dataset 'folder:f\\udcfcr' is not UTF-8"): RunSpec(dataset=os.fsdecode(b'folder:f\xfcr'))
    assert RunSpec(dataset='folder:für').fingerprint == RunSpec.from_dict(json.loads(RunSpec(dataset='folder:für').to_json())).fingerprint

# ---------------------------------------------------------------- transparent images
SEEN = np.uint8([[255, 127, 0]])  # nothing, half black ink, black ink, over white

def transparent(mode):
    "The same three pixels in each way in which a file can say that some of them are transparent; True or False for half-transparent ones."
    alpha = np.uint8([[0, 128, 255]])
    rgba = Image.fromarray(np.dstack([np.zeros((1, 3, 3), np.uint8), alpha]))
    if mode in ('RGBA', 'LA'): return rgba.convert(mode), SEEN
    if mode == 'P':  # a palette with an alpha for each entry, as PNG's tRNS has it
        img = Image.fromarray(np.uint8([[0, 1, 2]])).convert('P')
        img.putpalette([0]*9)
        img.info['transparency'] = bytes([0, 128, 255])
        return img, SEEN
    img = Image.fromarray(np.uint8([[7, 40, 0]])).convert({'1 grey': 'L', '1 colour': 'RGB'}[mode])  # one value stands for transparent
    img.info['transparency'] = 7 if mode == '1 grey' else (7, 7, 7)
    return img, np.uint8([[255, 40, 0]])

@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', '1 grey', '1 colour'])
def test_transparent_images_are_laid_over(mode, tmp_path):
    img, want = transparent(mode)
    got, seen = lay_over(img)
    assert seen and got.mode == ('L' if mode in ('LA', '1 grey') else 'RGB') and np.array_equal(np.asarray(got.convert('L')), want)
    assert np.array_equal(np.asarray(lay_over(img, 'black')[0].convert('L')), np.where(want == 255, 0, np.where(want == 127, 0, want)))
    img.save(tmp_path/'a.png')
    with Image.open(tmp_path/'a.png') as again: assert np.array_equal(np.asarray(lay_over(again)[0].convert('L')), want)

def test_opaque_images_stay_as_they_are():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode in ('1', 'L', 'P', 'RGB', 'CMYK'): assert lay_over(img := grey.convert(mode)) == (img, False)
    for mode in ('LA', 'RGBA'):
        got, seen = lay_over(grey.convert(mode))
        assert not seen and np.array_equal(np.asarray(got.convert('L')), np.asarray(grey)) and got.mode == ('L' if mode == 'LA' else 'RGB')

# ---------------------------------------------------------------- batches that fit
def test_default_batches_make_four_steps():
    for n in range(1, 2000):
        b = fitting_batch(n)
        assert 1 <= b <= min(n, 128) and (b <= 4 or (n//b >= 4 and b & (b - 1) == 0)) and (b == 128 or n//(2*b) < 4)
    assert fitting_batch(512) == fitting_batch(10**6) == 128

def test_batch_of_a_spec():
    assert RunSpec().batch_size == RunSpec(batch_size=128).batch_size == 128 and RunSpec() == RunSpec(batch_size=128)
    assert RunSpec(n_train=100).batch_size == 16 and RunSpec(n_train=100, batch_size=50).batch_size == 50 and RunSpec(dataset='folder:photos').batch_size is None
    assert all(RunSpec(bits=b).batch_size == 128 for b in BITS)

def test_an_underscore_between_digits_names_no_bits():
    "Python's float reads '3_2' as 32, which would be the float network."
    for value in ('3_2', '4_0', '4_'):
        with pytest.raises(BadInput, match=f"bits '{value}' is unknown; allowed: 32, 8, 4"): RunSpec(bits=value)

def test_bits_of_the_ends_may_be_text():
    for value in ('8', '8.0', 8., np.int64(8)): assert RunSpec(first_last_bits=value) == RunSpec(first_last_bits=8)
    with pytest.raises(BadInput, match="first_last_bits '7' is unknown"): RunSpec(first_last_bits='7')
