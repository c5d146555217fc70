"""PRSNet: masks, sizes to the unit, exact folding, the separate masked pass, MAE's tokens."""

import numpy as np
import prsnet_small as small
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prsnet import flags, masking, pretrain, train
from prsnet.deploy import compare, random_encoder
from prsnet.mae import MAE, MAEFeature, ViTEncoder, patches, position_code, unpatch, visible
from prsnet.model import SIZES, ConvBlock, Decoder, Encoder, PRSNet, RepDepthwise, fold, frozen_statistics
from prsnet.reid import ReID

TINY = SIZES["tiny"]
DEAD_EMBEDDING = 3 * 16 * 8 * 1024 + 1024  # the authors' patch embedding, whose output nobody uses


def count(model):
    return sum(p.numel() for p in model.parameters())


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------- masks


def test_exactly_192_of_256_blocks_are_zero_in_every_image():
    images = 1 + torch.rand(5, 3, 256, 128, generator=draw())
    holes = masking.apply(images, masking.random_mask(5, (16, 16), 0.75, draw()))
    for image, original in zip(holes, images):
        hidden = 0
        for top in range(0, 256, 16):
            for left in range(0, 128, 8):
                block = image[:, top : top + 16, left : left + 8]
                assert (block == 0).all() or torch.equal(block, original[:, top : top + 16, left : left + 8])
                hidden += bool((block == 0).all())
        assert hidden == 192


def test_masks_are_uniform_independent_and_reproducible():
    masks = masking.random_mask(4000, (4, 4), 0.75, draw()).flatten(1)
    assert (masks.sum(1) == 12).all()
    assert (masks.float().mean(0) - 0.75).abs().max() < 0.03
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks, masking.random_mask(4000, (4, 4), 0.75, draw()).flatten(1))


def test_eq1_is_the_mean_over_hidden_values_and_has_no_gradient_on_visible_pixels():
    images, masked = torch.randn(3, 3, 64, 32, generator=draw()), masking.random_mask(3, (16, 16), 0.75, draw(1))
    rebuilt = torch.randn(3, 3, 64, 32, generator=draw(2), requires_grad=True)
    loss = masking.reconstruction_loss(images, rebuilt, masked)
    total, values = 0.0, 0
    for b in range(3):
        for i in range(64):
            for j in range(32):
                if masked[b, i // 4, j // 2]:
                    total += ((images[b, :, i, j] - rebuilt[b, :, i, j]) ** 2).sum().item()
                    values += 3
    assert loss.item() == pytest.approx(total / values, rel=1e-5)
    loss.backward()
    hidden = masking.to_pixels(masked, 64, 32).expand(-1, 3, -1, -1)
    assert (rebuilt.grad[~hidden] == 0).all() and (rebuilt.grad[hidden] != 0).all()
    assert torch.equal(masking.apply(images, masked) == 0, hidden)  # the loss map is the zeroed map


def test_authors_region_is_a_quarter_of_which_three_quarters_were_hidden():
    noise = masking.draw(500, (16, 16), draw())
    region, masked = masking.authors_region(noise, (16, 16), 192), masking.from_noise(noise, (16, 16), 192)
    assert (region.sum((1, 2)) == 64).all()
    assert masked[region].float().mean().item() == pytest.approx(0.749, abs=0.01)


@pytest.mark.parametrize(
    "block, message", [((15, 8), "height 15 must be one of 2, 4, 8, 16"), ((16, 7), "width 7 must be one of 2, 4, 8")]
)
def test_block_that_does_not_divide_is_named_with_those_that_do(block, message):
    with pytest.raises(ValueError, match=message):
        masking.grid_of(256, 128, block)


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_parameter_counts_of_the_convolutional_networks_to_the_unit():
    with torch.device("meta"):
        plain, rep, authors = Encoder("plain"), Encoder("rep"), Encoder("plain", bottleneck=768)
        small, large, v2 = Decoder(256, 128, bottleneck=768), Decoder(256, 128), Encoder("v2", bottleneck=768)
        dense = nn.Conv2d(768, 2048, 3)
    proj = 768 * 2048
    assert count(plain) - proj == 27_818_592 and count(plain) == 29_391_456
    assert count(rep) - proj == 27_931_200 and count(rep) == 29_504_064
    assert count(authors) == 27_820_128
    assert count(small) == 46_728_003 and count(large) == 78_189_379
    assert count(authors) + count(small) + DEAD_EMBEDDING == 74_942_371  # V1 autoencoder as released
    assert (
        count(plain) + DEAD_EMBEDDING + 2 * 768 == 29_787_232
    )  # V1 ReID encoder as released: + unused embedding and LN
    assert count(v2) + count(small) + DEAD_EMBEDDING == 81_995_395  # V2 autoencoder
    assert sum(count(stage[1].branch) for stage in v2.stages) == 7_051_680
    assert count(v2) + DEAD_EMBEDDING + count(dense) == 49_425_216 and count(dense) == 14_157_824  # V2 ReID encoder


def test_parameter_counts_of_mae_and_of_the_head_to_the_unit():
    with torch.device("meta"):
        encoder, autoencoder = ViTEncoder(256, 128), MAE()
        reid = ReID(Encoder("plain"), 2048, 751)
        released = MAEFeature(ViTEncoder(256, 128), head="authors24")
    assert count(encoder) + encoder.positions.numel() == 85_549_824
    assert count(released.head) == 49_152
    assert count(autoencoder) - count(encoder) == 25_811_328  # decoder, 25.8 M
    assert count(reid.neck) + count(reid.classifier) == 2 * 2048 + 2048 * 751


def test_multiply_adds_per_image_are_the_ones_of_the_table():
    def macs(model, *inputs):
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        return counter.get_total_flops() / 2e9

    with torch.device("meta"):
        x, z = torch.empty(1, 3, 256, 128), torch.empty(1, 2048)
        late = 31 * 768 * 2048 / 1e9  # the table projects 32 places before pooling; pooling first needs one
        assert macs(Encoder("rep").eval(), x) + late == pytest.approx(2.97, abs=0.01)
        assert macs(Encoder("plain").eval(), x) + late == pytest.approx(2.96, abs=0.01)
        assert macs(Decoder(256, 128), z) == pytest.approx(3.04, abs=0.01)


def test_stages_halve_the_map_and_the_decoder_returns_the_image():
    encoder, x = Encoder("rep", TINY).eval(), torch.randn(2, 3, 256, 128, generator=draw())
    for stage, channels, shape in zip(encoder.stages, TINY.dims, ((64, 32), (32, 16), (16, 8), (8, 4))):
        x = stage(x)
        assert x.shape == (2, channels, *shape)
    assert Decoder(256, 128, TINY)(torch.randn(2, 64, generator=draw())).shape == (2, 3, 256, 128)
    assert [type(layer).__name__ for layer in Decoder(256, 128, TINY).layers][:2] == ["ConvTranspose2d", "ConvBlock"]


def test_projection_after_pooling_is_the_projection_before_it():
    encoder, x = Encoder("plain", TINY).eval(), torch.randn(2, 3, 64, 32, generator=draw())
    before = torch.einsum("oc,bchw->bohw", encoder.proj.weight, encoder.maps(x)).mean((2, 3))
    assert torch.allclose(encoder(x), before, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- folding


def test_folded_depthwise_equals_its_branches_in_float64():
    layer = RepDepthwise(6).double().eval()
    for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 6, 9, 8, generator=draw(), dtype=torch.float64)
    assert (layer(x) - layer.folded()(x)).abs().max() < 1e-12


def test_folded_network_equals_the_training_network_and_loads_into_plain():
    encoder = random_encoder("tiny")
    folded, plain = fold(encoder), Encoder("plain", TINY).eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    with torch.inference_mode():
        x = torch.randn(4, 3, 64, 32, generator=draw())
        a, b, c = encoder(x), folded(x), plain(x)
    assert a.abs().max() > 0.02  # the comparison is of something
    assert (a - b).abs().max() < 1e-4 * a.abs().max() and torch.equal(b, c)
    assert any(isinstance(m, RepDepthwise) for m in encoder.modules())  # the original is left as it was


@pytest.mark.slow
def test_full_size_fold_is_equal_and_faster():
    encoder = random_encoder("full")
    found = compare(encoder, fold(encoder), torch.randn(2, 3, 256, 128, generator=draw()), passes=5)
    assert found["deviation"] < 1e-4 < found["largest_output"]
    assert found["speedup"] > 1


@pytest.mark.parametrize("block", ["plain", "v2"])
def test_what_cannot_be_folded_is_refused_with_the_reason(block):
    with pytest.raises(ValueError, match="only --block rep"):
        fold(Encoder(block, TINY))


# --------------------------------------------------------------------------------------- statistics, parameters, blocks


@pytest.mark.parametrize("block", ["rep", "v2"])
def test_masked_pass_leaves_statistics_alone_to_the_bit(block):
    model = ReID(Encoder(block, TINY), 64, 5).train()
    x, masked = torch.randn(8, 3, 64, 32, generator=draw()), masking.random_mask(8, (16, 16), 0.75, draw())
    once, twice = model.state_dict(), None
    model(x)
    once = {k: v.clone() for k, v in model.state_dict().items()}
    with frozen_statistics(model):
        model.encoder(x, masked)
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())
    model(x)
    twice = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = ReID(Encoder(block, TINY), 64, 5).train()
    fresh.load_state_dict(once)
    fresh(x, masked)  # clean and masked pass
    assert all(torch.equal(v, twice[k]) for k, v in fresh.state_dict().items())
    polluted = ReID(Encoder(block, TINY), 64, 5, polluted=True).train()
    polluted.load_state_dict(once)
    polluted(x, masked)
    assert not torch.equal(polluted.neck.running_mean, fresh.neck.running_mean)


@pytest.mark.parametrize(
    "model",
    [
        lambda: PRSNet(64, 32, "rep", TINY),
        lambda: PRSNet(64, 32, "plain", TINY, 32),
        lambda: PRSNet(64, 32, "v2", TINY),
        lambda: MAE(64, 32, (4, 2), TINY),
    ],
)
def test_one_step_changes_every_parameter(model):
    torch.manual_seed(0)
    model = model()
    x, masked = torch.randn(4, 3, 64, 32, generator=draw()), masking.random_mask(4, (16, 16), 0.75, draw())
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    masking.reconstruction_loss(x, model(x, masked), masked).backward()
    optimizer.step()
    assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []


def test_v2_block_adds_the_stage_input_convolution_at_every_block():
    torch.manual_seed(0)
    stage = Encoder("v2", TINY).stages[2][1]
    x = torch.randn(2, 24, 4, 4, generator=draw())
    expected = x
    for block in stage.blocks:
        y = block.dwconv(expected).permute(0, 2, 3, 1)
        y = (block.gamma * block.reduce(nn.functional.mish(block.expand(block.norm(y))))).permute(0, 3, 1, 2)
        expected = expected + nn.functional.conv2d(x, stage.branch.weight, stage.branch.bias, padding=1) + y
    assert torch.allclose(stage(x), expected, atol=1e-6)
    assert all(isinstance(block, ConvBlock) for block in stage.blocks)


# ------------------------------------------------------------------------------------------------------------------ MAE


def test_patches_are_blocks_in_row_order_and_unpatch_undoes_them():
    x = torch.randn(2, 3, 8, 6, generator=draw())
    cut = patches(x, (4, 2))
    assert torch.equal(cut[1, 4], x[1, :, 4:8, 2:4].flatten())  # row 1, column 1 of a grid of 2 x 3
    assert torch.equal(unpatch(cut, (4, 2), (2, 3)), x)


def test_mae_encoder_sees_nothing_of_the_hidden_blocks():
    encoder = ViTEncoder(64, 32, (4, 2), TINY).eval()
    x, masked = torch.randn(2, 3, 64, 32, generator=draw()), masking.random_mask(2, (16, 16), 0.75, draw())
    other = torch.where(masking.to_pixels(masked, 64, 32), torch.randn_like(x), x)
    with torch.no_grad():
        tokens = encoder.tokens(x, masked)
        assert tokens.shape == (2, 1 + 64, 32) and torch.equal(tokens, encoder.tokens(other, masked))
    for row, hidden in zip(visible(masked, 192), masked.flatten(1)):
        assert row.tolist() == [i for i in range(256) if not hidden[i]]


def test_mae_attention_equals_the_softmax_written_out():
    block = ViTEncoder(64, 32, (4, 2), TINY).blocks[0].attention
    x = torch.randn(1, 5, 32, generator=draw())
    q, k, v = block.qkv(x)[0].split(32, 1)
    heads = [torch.softmax(q[:, h] @ k[:, h].T / 4, 1) @ v[:, h] for h in (slice(0, 16), slice(16, 32))]
    assert torch.allclose(block(x)[0], block.proj(torch.cat(heads, 1)), atol=1e-6)


def test_position_code_of_a_rectangle_has_rows_and_columns():
    code = position_code(8, 3, 5)
    assert code.shape == (1, 16, 8) and not code[0, 0].any()
    row, column = 2, 3
    expected = [
        np.sin(row),
        np.sin(row / 100),
        np.cos(row),
        np.cos(row / 100),
        np.sin(column),
        np.sin(column / 100),
        np.cos(column),
        np.cos(column / 100),
    ]
    assert np.allclose(code[0, 1 + row * 5 + column], expected, atol=1e-6)


def test_authors_mae_head_has_rank_24_at_most():
    torch.manual_seed(0)
    size = SIZES["tiny"]._replace(vit=(48, 1, 2))
    model = MAEFeature(ViTEncoder(64, 32, (4, 2), size), 64, "authors24").eval()
    with torch.no_grad():
        feats = model(torch.randn(40, 3, 64, 32, generator=draw()))
    assert torch.linalg.matrix_rank(feats - feats.mean(0), rtol=1e-4) <= 24


def test_a_mask_of_another_ratio_is_refused_by_the_transformer():
    with pytest.raises(ValueError, match="hides 128 blocks; this transformer was built for 192"):
        ViTEncoder(64, 32, (4, 2), TINY).tokens(
            torch.zeros(1, 3, 64, 32), masking.random_mask(1, (16, 16), 0.5, draw())
        )


# ------------------------------------------------------------------------------------------------------ what comes out


def test_retrieval_is_by_features_behind_the_neck():
    args = flags.train_args([*small.WORDS, "--weights", "none"])
    model, x = train.build_model(args, 3).eval(), torch.randn(4, 3, 64, 32)
    model.neck.running_mean.normal_()
    model.neck.running_var.uniform_(0.5, 2.0)
    model.neck.weight.data.uniform_(0.5, 2.0)
    f = model.encoder(x)
    expected = (f - model.neck.running_mean) / (model.neck.running_var + 1e-5).sqrt() * model.neck.weight
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("model", ["prsnet", "mae"])
def test_under_bf16_what_leaves_a_network_is_not_rounded(model):
    words = [*small.WORDS, "--model", model, "--amp", "bf16"]
    x, masked = torch.randn(4, 3, 64, 32), masking.random_mask(4, (16, 16), 0.75, draw())
    reid = train.build_model(flags.train_args([*words, "--weights", "none"]), 3).train()
    autoencoder = pretrain.build_model(flags.pretrain_args(words))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*reid(x, masked), reid.eval()(x), autoencoder(x, masked)]
        assert torch.nn.Linear(32, 32)(x).dtype == torch.bfloat16
    for value in outputs:
        assert value.dtype == torch.float32 and (value != value.bfloat16()).float().mean() > 0.9
