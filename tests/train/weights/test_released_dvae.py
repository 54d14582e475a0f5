"""The released dVAE: equal outputs with equal weights, weights there and back, and its pickles read without executing anything."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra import storage
from infra.errors import ConfigError, DataError
from infra.signals import StopFlag
from model.config import DVAEConfig
from model.dvae import DVAE, map_pixels, pictures, unmap_pixels
from train import launch
from train.verbs import import_dvae
from train.weights.pickle_tree import read_tree
from train.weights.released_dvae import HALVES, join_halves, read_half, shape_of

dall_e = pytest.importorskip("dall_e")

SMALL = DVAEConfig(image_size=32, downsample=8, groups=4, blocks_per_group=1, width=64, init_width=16, vocab=512)
PUT = [
    f"dvae.{key}={value}" for key, value in (("image_size", 16), ("downsample", 8), ("groups", 4), ("width", 64), ("init_width", 16), ("vocab", 512))
]
PUT += [f"{stage}_fit.{word}" for stage in ("dalle", "clip") for word in ("steps=2", "precision=fp32")] + ["generate.num_captions=2"]


def split_halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our tensors -> what ``load_state_dict`` of the release's encoder and decoder take."""
    encoder, decoder = ({name.removeprefix(f"{half}."): tensor for name, tensor in tensors.items() if name.startswith(f"{half}.")} for half in HALVES)
    return encoder, decoder


def released(blocks: int = 1) -> tuple[nn.Module, nn.Module]:
    """Modules of the package, as small as its validators allow, with biases that are not zero."""
    torch.manual_seed(1)
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=blocks, vocab_size=512)
    decoder = dall_e.Decoder(n_init=16, n_hid=64, n_blk_per_group=blocks, vocab_size=512)
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *decoder.parameters()]:
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
    return encoder, decoder


def some_pictures(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("blocks", [1, 2])
def test_outputs_with_the_weights_of_the_package_are_those_of_the_package(blocks: int) -> None:
    encoder, decoder = released(blocks)
    ours = DVAE(DVAEConfig(**vars(SMALL) | {"blocks_per_group": blocks}))
    ours.load_state_dict(join_halves(encoder.state_dict(), decoder.state_dict()))
    mapped = map_pixels(some_pictures())
    assert torch.equal(mapped, dall_e.map_pixels(some_pictures()))
    with torch.no_grad():
        logits, theirs = ours.encoder(mapped), encoder(mapped)
        assert relative(logits, theirs) < 1e-6
        codes = theirs.argmax(1)
        assert torch.equal(ours.encode(some_pictures()), codes)
        one_hot = nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float()
        stats = decoder(one_hot)
        assert relative(ours.decoder(one_hot), stats) < 1e-6
        relaxed = logits.softmax(1)
        assert relative(ours.decoder(relaxed), decoder(relaxed)) < 1e-6
        drawn = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3]))
        assert relative(ours.decode(codes), drawn) < 1e-5
        assert torch.equal(unmap_pixels(mapped), dall_e.unmap_pixels(mapped)) and torch.equal(pictures(stats), drawn)


def test_our_weights_load_into_the_package_and_give_our_outputs() -> None:
    torch.manual_seed(3)
    ours = DVAE(SMALL)
    encoder, decoder = released()
    for module, tensors in zip((encoder, decoder), split_halves(ours.state_dict()), strict=True):
        module.load_state_dict(tensors)
    mapped = map_pixels(some_pictures())
    with torch.no_grad():
        assert relative(ours.encoder(mapped), encoder(mapped)) < 1e-6
        z = torch.rand(2, 512, 4, 4)
        assert relative(ours.decoder(z), decoder(z)) < 1e-6
    again = join_halves(encoder.state_dict(), decoder.state_dict())
    assert again.keys() == ours.state_dict().keys() and all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_released_sizes_have_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        ours = DVAE(DVAEConfig()).state_dict()
    # The package initialises on a device of its own: one parameter after another, so that memory stays small.
    with torch.device("meta"):
        theirs = join_halves(dall_e.Encoder(device=torch.device("meta")).state_dict(), dall_e.Decoder(device=torch.device("meta")).state_dict())
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in theirs.items()}


def write(module: Any, kind: str, path: Path) -> Path:
    if kind == "zip":
        torch.save(module, path)
    elif kind == "legacy":
        torch.save(module, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(module, protocol=int(kind)))
    return path


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("kind", ["zip", "legacy", "2", "3", "4", "5"])
def test_every_way_of_pickling_the_modules_is_read_to_the_bit(kind: str, tmp_path: Path) -> None:
    encoder, decoder = released()
    halves = [read_half(str(write(module, kind, tmp_path / name))) for module, name in ((encoder, "e.pkl"), (decoder, "d.pkl"))]
    for half, module in zip(halves, (encoder, decoder), strict=True):
        assert half.tensors.keys() == module.state_dict().keys()
        assert all(torch.equal(half.tensors[name], tensor) for name, tensor in module.state_dict().items())
    assert shape_of(halves[0], halves[1], SMALL) == SMALL


def test_state_dictionaries_and_half_precision_are_read_too(tmp_path: Path) -> None:
    encoder, decoder = released()
    halves = [read_half(str(write(module.half().state_dict(), "zip", tmp_path / "x.pkl"))) for module in (encoder, decoder)]
    assert {tensor.dtype for half in halves for tensor in half.tensors.values()} == {torch.float32}
    assert all(torch.equal(halves[0].tensors[name], tensor.float()) for name, tensor in encoder.state_dict().items())
    assert shape_of(halves[0], halves[1], SMALL) == SMALL


# --- Hostile and damaged files ------------------------------------------------------------------------------------------------------------


class Harm:
    """Unpickled, it would run a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def harms(trap: Path) -> dict[str, Any]:
    """Things that a pickle may do; most would leave ``trap`` behind."""
    return {
        "system": Harm(os.system, f"touch {trap}"),
        "eval": Harm(eval, f"open({str(trap)!r}, 'w')"),
        "open": Harm(open, str(trap), "w"),
        "getattr": Harm(getattr, "", "upper"),
        "load": Harm(torch.load, str(trap)),
        "Popen": Harm(subprocess.Popen, ["touch", str(trap)]),
    }


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("name", sorted(harms(Path("trap"))))
@pytest.mark.parametrize("kind", ["zip", "legacy", "2", "4", "inside"])
def test_a_pickle_that_would_run_something_is_refused_by_name_and_runs_nothing(name: str, kind: str, tmp_path: Path) -> None:
    trap, harm = tmp_path / "trap", harms(tmp_path / "trap")[name]
    if kind == "inside":  # a good module with one bad attribute
        harm, kind = released()[0], "zip"
        harm.note = harms(trap)[name]
    path = write(harm, kind, tmp_path / "x.pkl")
    with pytest.raises(DataError, match=rf"names '[a-z_.]*\.{name}', which has no place .* nothing of it was executed"):
        read_half(str(path))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "names 'os.system'"),
        (b"(S'true'\nios\nsystem\n.", "operation (STRING|INST) has no place"),
        (b"\x80\x02\x82\x01.", "operation EXT1 has no place"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets attributes of 'collections.OrderedDict', which is no object of its own"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n}b.", "sets attributes of 'torch._utils._rebuild_parameter'"),
        (b"\x80\x02}U\x01aK\x01s.", "damaged|operation SHORT_BINSTRING"),
        (b"\x80\x04", "damaged"),
        (b"", "damaged"),
        (b"no pickle at all", "damaged|no place"),
        (b"\x80\x02K\x01.", "int where a module or a dictionary belongs"),
        (b"\x80\x02K\x01a.", "damaged"),
        (b"\x80\x02K\x01K\x02\x85\x86t.", "damaged"),
    ],
)
def test_other_pickles_are_refused_with_a_reason(pickled: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled)
    with pytest.raises(DataError, match=message):
        read_half(str(path))


def test_a_persistent_identifier_in_a_plain_pickle_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", 1) if isinstance(value, set) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"a": set()})
    (tmp_path / "x.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"persistent identifier .* in a plain pickle"):
        read_half(str(tmp_path / "x.pkl"))
    with pytest.raises(DataError, match="cannot be read"):
        read_half(str(tmp_path / "none.pkl"))


@pytest.mark.parametrize("kind", ["zip", "legacy", "4"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind: str, tmp_path: Path) -> None:
    path = write({"a": torch.arange(40.0)}, kind, tmp_path / "x.pkl")
    assert torch.equal(read_half(str(path)).tensors["a"], torch.arange(40.0))
    whole = path.read_bytes()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match="damaged"):
            read_half(str(path))


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...], offset: int, path: Path) -> Path:
    """A file of one tensor of 40 numbers whose header claims another shape."""

    class Claim:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (torch.arange(40.0).untyped_storage(), offset, size, stride, False, collections.OrderedDict())

    buffer = io.BytesIO()
    torch.save({"a": torch.arange(40.0)}, buffer, _use_new_zipfile_serialization=True)
    archive = zipfile.ZipFile(buffer)
    with zipfile.ZipFile(path, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):  # the header's K\x00 (offset), K( (size), K\x01 (stride)
                numbers = (b"K" + bytes([offset]), b"K" + bytes([size[0]]), b"K" + bytes([stride[0]]))
                old = data[data.index(b"QK\x00K(\x85") :][:10] if b"QK\x00K(\x85" in data else b""
                assert old, "the header's layout"
                at = data.index(b"QK\x00K(\x85")
                tail = data[at + 6 :]
                stride_at = tail.index(b"K\x01\x85")
                data = data[:at] + b"Q" + numbers[0] + numbers[1] + b"\x85" + tail[:stride_at] + numbers[2] + tail[stride_at + 2 :]
            out.writestr(name, data)
    return path


@pytest.mark.parametrize(("size", "stride", "offset"), [((41,), (1,), 0), ((40,), (2,), 0), ((40,), (1,), 1), ((200,), (0,), 0)])
def test_a_tensor_that_reaches_outside_of_its_storage_is_refused(size: tuple[int, ...], stride: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    assert torch.equal(read_half(str(rebuilt((40,), (1,), 0, tmp_path / "good.pkl"))).tensors["a"], torch.arange(40.0))
    with pytest.raises(DataError, match="that its storage does not hold"):
        read_half(str(rebuilt(size, stride, offset, tmp_path / "x.pkl")))


def test_archives_that_torch_never_writes_are_refused(tmp_path: Path) -> None:
    good = zipfile.ZipFile(write({"a": torch.arange(40.0)}, "zip", tmp_path / "good.pkl"))

    def rewrite(change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> str:
        with zipfile.ZipFile(tmp_path / "x.pkl", "w", compression) as out:
            for name in good.namelist():
                out.writestr(name, next((data for end, data in change.items() if name.endswith(end)), good.read(name)))
        return str(tmp_path / "x.pkl")

    assert read_half(rewrite({})).tensors
    for path, message in (
        (lambda: rewrite({"data/0": b"short"}), "another size than its header says"),
        (lambda: rewrite({"byteorder": b"big"}), "not little-endian"),
        (lambda: rewrite({}, zipfile.ZIP_DEFLATED), "compressed"),
    ):
        with pytest.raises(DataError, match=message):
            read_half(path())


def test_sizes_in_the_older_format_must_agree(tmp_path: Path) -> None:
    path = write({"a": torch.arange(40.0)}, "legacy", tmp_path / "x.pkl")
    data = path.read_bytes()
    assert data.count(struct.pack("<q", 40)) == 1
    path.write_bytes(data.replace(struct.pack("<q", 40), struct.pack("<q", 39)))
    with pytest.raises(DataError, match="another size than its header says"):
        read_half(str(path))


class Made:
    """Pickled, a call of a function that such files may name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def older(tree: Any, identifier: tuple[Any, ...], path: Path) -> str:
    """A file in torch's older format whose sets stand for one persistent identifier."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return identifier if isinstance(value, set) else None

    buffer = io.BytesIO()
    head: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {})
    for value in head:
        pickle.dump(value, buffer, protocol=2)
    Pickler(buffer, protocol=2).dump(tree)
    pickle.dump([], buffer, protocol=2)
    path.write_bytes(buffer.getvalue())
    return str(path)


def test_what_stands_where_a_tensor_or_a_storage_belongs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    empty: Any
    empty, rebuild, load = collections.OrderedDict(), torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes
    inner = io.BytesIO()
    torch.save({"a": 1}, inner, _use_new_zipfile_serialization=False)
    for tree, message in (
        (empty, "'collections.OrderedDict' where a tensor belongs"),
        (Made(rebuild, empty, 0, (1,), (1,)), "'collections.OrderedDict' where a storage belongs"),
        (Made(rebuild, Made(load, inner.getvalue()), 0, (1,), (1,)), r"no storage\)"),
    ):
        path.write_bytes(pickle.dumps({"a": tree}, protocol=4))
        with pytest.raises(DataError, match=message):
            read_half(str(path))
    for identifier, message in (
        (("storage", torch.FloatStorage, "0", "cpu", 1, (0, 1)), "a view of a storage"),
        (("storage", collections.OrderedDict, "0", "cpu", 1, None), "no storage: 'storage', collections.OrderedDict"),
        (("tensor", torch.FloatStorage, "0", "cpu", 1, None), "no storage: 'tensor'"),
    ):
        with pytest.raises(DataError, match=message):
            read_half(older({"a": Made(rebuild, set(), 0, (1,), (1,))}, identifier, path))


def test_a_pickle_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match="damaged"):
        read_tree(io.BytesIO(b"\x80\x02N"), (), lambda identifier: identifier, "x")


# --- The verb -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    launch.stage("prepare", "tiny", [f"run.root={root}", *PUT], on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    encoder, decoder = released()
    return str(write(encoder, "zip", folder / "encoder.pkl")), str(write(decoder, "zip", folder / "decoder.pkl"))


def test_the_pipeline_goes_on_from_imported_weights_without_stage_1_up_to_pictures(prepared: Path, files: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "runs")
    words = [f"run.root={tmp_path}/runs", *PUT]
    config = tmp_path / "runs" / "tiny" / "config.json"
    config.write_text(config.read_text().replace(str(prepared), f"{tmp_path}/runs"))
    import_dvae.dvae(*files, "tiny", words, samples=4)
    marker = storage.read_json(f"{tmp_path}/runs/tiny/dvae/done.json")
    assert marker["summary"]["imported"]["encoder"] == storage.sha256_file(Path(files[0]))
    assert marker["summary"]["psnr"] > 0 and (tmp_path / "runs/tiny/dvae/pictures/reconstructions.png").exists()
    for name in ("tokenizer", "encode", "dalle", "clip", "generate"):
        launch.stage(name, "tiny", words, on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())
    manifest = json.loads((tmp_path / "runs/tiny/codes/crop-0/train/manifest.json").read_text())
    assert manifest["parents"]["dvae"] == marker["weights"]
    assert storage.read_json(f"{tmp_path}/runs/tiny/dalle/done.json")["parents"]["dvae"] == marker["weights"]
    drawn = storage.read_json(f"{tmp_path}/runs/tiny/generate/done.json")
    assert drawn["parents"]["dvae"] == marker["weights"] and (tmp_path / "runs/tiny/generate/grid.png").exists()
    with pytest.raises(ConfigError, match=r"holds a dVAE already, trained or imported; use another run\.name"):
        import_dvae.dvae(*files, "tiny", words, samples=4)


def test_files_of_another_shape_name_the_keys_to_give(files: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"another shape than this configuration; give dvae\.downsample=8 dvae\.groups=4 dvae\.width=64"):
        import_dvae.dvae(*files, "tiny", [], samples=4)


def test_halves_in_the_wrong_order_or_of_different_models_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"these take 512 and give 512: give encoder\.pkl first and decoder\.pkl second"):
        import_dvae.read(files[1], files[0], SMALL)
    other = write(dall_e.Decoder(n_init=16, n_hid=128, n_blk_per_group=1, vocab_size=512), "zip", tmp_path / "d.pkl")
    with pytest.raises(DataError, match=r"do not belong together: .*size mismatch"):
        import_dvae.read(files[0], str(other), SMALL)
    empty = write({"a": torch.ones(2)}, "zip", tmp_path / "e.pkl")
    with pytest.raises(ConfigError, match=r"no pair of encoder and decoder: 'blocks\.input\.w' is missing; give encoder\.pkl first"):
        import_dvae.read(str(empty), files[1], SMALL)
