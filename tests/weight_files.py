"""What the tests of --weights write: state dicts by other names, with other values, in files."""

import torch

from convnext_ap.model import ConvNeXtAP


def save(content, folder, name="w.pth"):
    torch.save(content, folder / name)
    return str(folder / name)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def moved(state):
    return {name: value + 1 for name, value in state.items()}


def typed(state, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def assert_started(found, donor, tolerance=0.0):
    for name, value in donor.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def tiny_convnext(attention="none", parts=0, people=4):
    return ConvNeXtAP(people, "tiny", attention, parts)
