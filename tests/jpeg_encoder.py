"""A small JPEG encoder, for what Pillow does not write: lossless, 12 and 16 bit, any chroma sampling.

Its Huffman codes are all of one length, so they need no statistics. Clauses are those of ITU T.81.
"""

import itertools

import numpy as np
from PIL import Image

_BASELINE, _EXTENDED, _LOSSLESS = 0xC0, 0xC1, 0xC3
_ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))
_QUANTUM = 12
_DC_BITS, _AC_BITS = 5, 8
_AC_SYMBOLS = [0, 0xF0, *(run << 4 | size for run, size in itertools.product(range(16), range(1, 15)))]
_AC_CODES = {symbol: f"{code:0{_AC_BITS}b}" for code, symbol in enumerate(_AC_SYMBOLS)}
_FREQUENCIES, _PLACES = np.mgrid[:8, :8]
_COSINES = np.cos((2 * _PLACES + 1) * _FREQUENCIES * np.pi / 16) * np.where(_FREQUENCIES, 0.5, 8**-0.5)


def dct_jpeg(pixels, *, sampling=((1, 1), (1, 1), (1, 1)), bits=8):
    """A sequential JPEG of uint8 pixels of shape (h, w, 3).

    Args:
        sampling: (horizontal, vertical) factors, 1 to 4, of Y, Cb and Cr.
        bits: 8 or 12 for each sample.
    """
    height, width = pixels.shape[:2]
    most_x, most_y = np.max(sampling, axis=0)
    across, down = -(-width // (8 * most_x)), -(-height // (8 * most_y))  # numbers of MCUs
    planes = []
    for band, (x, y) in zip(Image.fromarray(pixels).convert("YCbCr").split(), sampling, strict=True):
        size = (-(-width * x // most_x), -(-height * y // most_y))
        plane = np.asarray(band.resize(size), np.float64) * (1 << bits - 8) - (1 << bits - 1)
        padding = ((0, down * y * 8 - size[1]), (0, across * x * 8 - size[0]))
        planes.append(_coefficients(np.pad(plane, padding, mode="edge")))
    codes, last = [], [0] * len(planes)
    for row, column in itertools.product(range(down), range(across)):
        for number, (x, y) in enumerate(sampling):
            for v, h in itertools.product(range(y), range(x)):
                block = planes[number][row * y + v, column * x + h].tolist()
                codes += _difference(block[0] - last[number])
                codes += _ac(block)
                last[number] = block[0]
    marker = _BASELINE if bits == 8 else _EXTENDED
    tables = _segment(0xDB, bytes([0] + [_QUANTUM] * 64)) + _segment(
        0xC4, _flat_table(0x10, _AC_BITS, _AC_SYMBOLS)
    )
    return _file(codes, marker, pixels.shape, ids=(1, 2, 3), bits=bits, sampling=sampling, tables=tables, end=63)


def lossless_jpeg(samples, *, predictor=1, bits=8):
    """A lossless JPEG of integers of shape (h, w, 1) for grey or (h, w, 3) for RGB.

    Args:
        predictor: 1 to 7, table H.1.
        bits: 2 to 16 for each sample.
    """
    values = samples.astype(np.int64)
    left, above, corner = (np.roll(values, shift, (0, 1)) for shift in ((0, 1), (1, 0), (1, 1)))
    predicted = {
        1: left,
        2: above,
        3: corner,
        4: left + above - corner,
        5: left + (above - corner >> 1),
        6: above + (left - corner >> 1),
        7: left + above >> 1,
    }[predictor]
    predicted[0], predicted[:, 0] = left[0], above[:, 0]
    predicted[0, 0] = 1 << bits - 1
    differences = (values - predicted + 0x8000) % 0x10000 - 0x8000
    codes = itertools.chain.from_iterable(map(_difference, differences.ravel().tolist()))
    num_components = samples.shape[2]
    ids = b"RGB" if num_components == 3 else (1,)
    sampling = ((1, 1),) * num_components
    return _file(codes, _LOSSLESS, samples.shape, ids=ids, bits=bits, sampling=sampling, start=predictor)


def _coefficients(plane):
    """Quantised coefficients in zigzag order, int of shape (rows, columns, 64) of blocks."""
    blocks = plane.reshape(plane.shape[0] // 8, 8, -1, 8).swapaxes(1, 2)
    transformed = _COSINES @ blocks @ _COSINES.T
    return np.rint(transformed / _QUANTUM).astype(int).reshape(*blocks.shape[:2], 64)[..., _ZIGZAG]


def _ac(block):
    """Codes of the 63 last coefficients, F.1.2.2."""
    run = 0
    for value in block[1:]:
        if value == 0:
            run += 1
            continue
        for _ in range(run // 16):
            yield _AC_CODES[0xF0]
        size = abs(value).bit_length()
        yield _AC_CODES[run % 16 << 4 | size]
        yield _extra(value, size)
        run = 0
    if run:
        yield _AC_CODES[0]


def _difference(value):
    """Codes of a DC or lossless difference, F.1.2.1 and H.1.2.2."""
    size = abs(value).bit_length()
    yield f"{size:0{_DC_BITS}b}"
    if size < 16:
        yield _extra(value, size)


def _extra(value, size):
    return f"{value if value >= 0 else value + (1 << size) - 1:0{size}b}" if size else ""


def _flat_table(place, length, symbols):
    return bytes([place, *(len(symbols) if bits == length else 0 for bits in range(1, 17)), *symbols])


def _segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def _file(codes, marker, shape, *, ids, bits, sampling, tables=b"", start=0, end=0):
    components = b"".join(bytes([name, x << 4 | y, 0]) for name, (x, y) in zip(ids, sampling, strict=True))
    frame = bytes([bits, *shape[0].to_bytes(2, "big"), *shape[1].to_bytes(2, "big"), len(ids)]) + components
    scan = bytes([len(ids), *itertools.chain.from_iterable((name, 0) for name in ids), start, end, 0])
    dc = _segment(0xC4, _flat_table(0, _DC_BITS, range(17 if marker == _LOSSLESS else 16)))
    stream = "".join(codes)
    stream += "1" * (-len(stream) % 8)
    data = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + tables + dc + _segment(marker, frame) + _segment(0xDA, scan) + data + b"\xff\xd9"
