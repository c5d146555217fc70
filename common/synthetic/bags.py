"""Bags of a person: drawn by the joints of a body.Figure, each at its place in the painters' order."""

from math import sin

import numpy as np

from common.synthetic import garments

BAG_PART = 4  # of Canvas.part


def backpack(figure) -> None:
    if figure.person.bag != "backpack":
        return
    wide = 0.070 + 0.012 * (figure.person.seed % 3)
    tall = 0.19 + 0.02 * (figure.person.seed % 4)
    top, low = figure.place(0, 0.80, -0.108), figure.place(0, 0.80 - tall, -0.118)
    widths = figure.around([wide * 0.8, wide, wide, wide * 0.95], [0.038, 0.05, 0.06, 0.055])
    figure.canvas.tube(
        top,
        low,
        widths,
        garments.bag(figure.person, 0.52),
        BAG_PART,
        caps=(0.028 * figure.size, 0.012 * figure.size),
        square=True,
    )


def satchel(figure) -> None:
    depth = -0.13 * -sin(figure.view.yaw)  # the bag hangs at the right hip, x = -0.13
    if figure.person.bag != "satchel" or depth < -0.06:
        return
    top, low = figure.place(-0.118, 0.55, 0.0), figure.place(-0.122, 0.45, 0.0)
    widths = figure.around([0.026, 0.030, 0.030], [0.07, 0.075, 0.075])
    figure.canvas.tube(
        top, low, widths, garments.bag(figure.person, 0.1), BAG_PART, caps=(0.008 * figure.size,) * 2, square=True
    )


def handbag(figure, hand) -> None:
    size = figure.size
    x, y = hand
    widths = figure.around([0.024, 0.03, 0.03], [0.055, 0.066, 0.068])
    strap = garments.bag(figure.person, 2.0)
    for shift in (-0.5, 0.5):
        figure.canvas.tube(
            (x, y), (x + shift * widths[0], y + 0.055 * size), np.array([0.005, 0.005]) * size, strap, BAG_PART
        )
    figure.canvas.tube(
        (x, y + 0.055 * size),
        (x, y + 0.145 * size),
        widths,
        garments.bag(figure.person, 0.35),
        BAG_PART,
        caps=(0.008 * size,) * 2,
        square=True,
    )
