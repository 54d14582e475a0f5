"""Files of published VQGANs: what is refused and why, and a run that goes on from one up to pictures. About 12 s."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from model.config import DVAEConfig
from model.vqgan import Vqgan
from tests.support import drawable_run
from tests.support.published_vqgans import NARROW, Published
from train import launch
from train.drawing import package
from train.drawing.pictures import load
from train.report.images import read_grid
from train.verbs import import_dvae
from train.weights.vqgan_files import read_vqgan

CFG = DVAEConfig(image_size=32)


@pytest.fixture(scope="module")
def published() -> Published:
    return Published("taming f8")


def saved(path: Path, tensors: dict[str, Any]) -> str:
    torch.save({"state_dict": tensors}, path)
    return str(path)


def without(published: Published, *starts: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in published.tensors.items() if not name.startswith(starts)}


def test_what_is_no_vqgan_or_not_supported_is_refused_with_the_reason(published: Published, tmp_path: Path) -> None:
    whole = published.tensors
    one = torch.ones(1)
    for tensors, message in (
        (whole | {"quantize.used": one}, r"numbers its codes anew \(remap, 'quantize\.used'\)"),
        (whole | {"colorize": one}, "a VQGAN of segmentation maps"),
        (without(published, "quantize."), r"an autoencoder without a codebook \(continuous latents, KL\)"),
        (whole | {"encoder.norm_out.running_mean": one}, "batch normalisation, which is not supported"),
        (
            {"blocks.input.w": one},
            r"no VQGAN of taming-transformers or LlamaGen: 'encoder\.conv_in\.weight' is missing; it has 1 tensors: blocks\.input\.w",
        ),
        (without(published, "encoder.down."), r"with groups of \[\] channels after 32"),
        (whole | {"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}, "an encoder from 4 channels"),
        (
            whole | {"quantize.proj.weight": one, "quantize.embed.weight": torch.ones(512, 8)},
            "of a shape that is not supported: codebook = 'gumbel' with latent = 16 and init_width = 8",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read_vqgan(saved(tmp_path / "x.ckpt", tensors)).shape(CFG)
    shape = read_vqgan(saved(tmp_path / "x.ckpt", whole)).shape(CFG)
    for tensors in (whole | {"encoder.temb.weight": one}, without(published, "decoder.up.1."), whole | {"decoder.conv_in.bias": one}):
        with pytest.raises(DataError, match=r"a VQGAN whose networks are not those of taming-transformers: .*(temb|decoder\.up\.1|conv_in\.bias)"):
            import_dvae.read_published(saved(tmp_path / "x.ckpt", tensors), shape)


def test_the_average_of_a_training_goes_before_its_weights_and_statistics_of_the_codebook_are_left_out(published: Published, tmp_path: Path) -> None:
    average = {name: tensor + 1 for name, tensor in published.tensors.items()}
    more = {"quantize.embedding.cluster_size": torch.ones(512), "quantize.embedding.embed_avg": torch.ones(512, 8)}
    torch.save({"model": published.tensors, "ema": average | more}, tmp_path / "x.pt")
    found = read_vqgan(str(tmp_path / "x.pt")).tensors
    assert found.keys() == published.tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in average.items())
    torch.save(published.tensors, tmp_path / "bare.pt")
    assert all(torch.equal(tensor, published.tensors[name]) for name, tensor in read_vqgan(str(tmp_path / "bare.pt")).tensors.items())


class Harm:
    """Unpickled, it would make a file."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trap}",)


def test_nothing_in_a_checkpoint_is_executed(published: Published, tmp_path: Path) -> None:
    torch.save({"state_dict": published.tensors, "hook": Harm(tmp_path / "trap")}, tmp_path / "x.ckpt")
    with pytest.raises(DataError, match=r"names 'posix\.system', which has no place .* nothing of it was executed"):
        read_vqgan(str(tmp_path / "x.ckpt"))
    assert not (tmp_path / "trap").exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    (tmp_path / "x.ckpt").write_bytes(b"PK no weights")
    for name, message in (
        ("x.safetensors", "damaged, or not a safetensors file"),
        ("none.safetensors", "cannot be read: published weights are read from a file on a disk"),
        ("x.ckpt", "damaged, or not a VQGAN's checkpoint"),
        ("none.ckpt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            read_vqgan(str(tmp_path / name))
    with pytest.raises(DataError, match="published weights are read from a disk; download the file"):
        read_vqgan("s3://bucket/x.ckpt")


def test_a_configuration_of_another_shape_is_told_what_to_set_and_the_stage_dvae_does_not_train(published: Published, tmp_path: Path) -> None:
    weights = published.write(tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"give dvae\.kind=vqgan .*'dvae\.factors=\[1,2,2,4\]' 'dvae\.attention=\[3\]' dvae\.latent=16"):
        import_dvae.vqgan(weights, "tiny", [f"run.root={tmp_path}"], samples=2)
    with pytest.raises(launch.StageFailed, match=r"dvae\.kind = 'vqgan' is imported, not trained: run '.*import-vqgan FILE .*' with its weights"):
        launch.stage("dvae", "tiny", words(tmp_path, published), on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())


def words(root: Path, published: Published) -> list[str]:
    few = [f"{stage}_fit.{word}" for stage in ("dalle", "clip") for word in ("steps=2", "precision=fp32")]
    return [
        f"run.root={root}",
        *published.words(16),
        *few,
        "generate.num_captions=2",
        "generate.candidates=2",
        "generate.show=2",
        "evaluate.samples=32",
        "generate.search=true",
        "evaluate.drawings=6",
        "evaluate.best_of=[1,2]",
        "evaluate.blur=[2]",
    ]


def test_a_run_goes_on_from_a_vqgan_up_to_pictures_figures_and_a_package(tmp_path: Path) -> None:
    published = Published(NARROW)
    put = words(tmp_path, published)

    def stage(*names: str) -> None:
        for name in names:
            launch.stage(name, "tiny", put, on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())

    stage("prepare")
    import_dvae.vqgan(published.write(tmp_path / "x.ckpt"), "tiny", put, samples=4)
    marker = storage.read_json(f"{tmp_path}/tiny/dvae/done.json")
    assert marker["summary"]["imported"]["weights"] == storage.sha256_file(tmp_path / "x.ckpt") and marker["summary"]["psnr"] > 0
    stage("tokenizer", "encode", "dalle")
    drawable_run.finish_clip(RunFolder(f"{tmp_path}/tiny"))
    stage("generate", "evaluate")
    assert storage.read_json(f"{tmp_path}/tiny/evaluate/metrics.json")["parents"]["dvae"] == marker["weights"]
    assert (tmp_path / "tiny/generate/grid.png").exists()
    drawings = storage.read_json(f"{tmp_path}/tiny/evaluate/drawings.json")
    assert drawings["drawings"] == 6 and list(drawings["retrieval"]) == ["own clip"] and list(drawings["retrieval"]["own clip"]["by_n"]) == ["1"]
    files = sorted((tmp_path / "tiny" / drawings["files"]).iterdir())
    assert len(files) == 6
    before, missing = [path.stat().st_mtime_ns for path in files[1:]], files[0].read_bytes()
    (tmp_path / "tiny/evaluate/done.json").unlink()
    files[0].unlink()
    stage("evaluate")
    assert [path.stat().st_mtime_ns for path in files[1:]] == before and files[0].read_bytes() == missing, (
        "only the missing one is drawn, and the same"
    )
    assert storage.read_json(f"{tmp_path}/tiny/evaluate/drawings.json") == drawings
    shown = read_grid((tmp_path / "tiny/dvae/pictures/reconstructions.png").read_bytes())
    assert shown is not None and shown.labels == ["original", "from its codes"]
    package.write(f"{tmp_path}/tiny", f"{tmp_path}/package")
    shutil.move(tmp_path / "tiny", tmp_path / "gone")
    model = load(f"{tmp_path}/package")
    (picture,) = model.draw(["a red fox"], n=1, seed=0)
    assert isinstance(model.models.dvae, Vqgan) and picture.size == (16, 16)
