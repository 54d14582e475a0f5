import numpy as np


def near_duplicates(h, bits):
    out = np.full(len(h), -1, np.int64)
    for i in range(len(h)):
        for j in range(i):
            if bin(int(h[i]) ^ int(h[j])).count("1") <= bits:
                out[i] = j
                break
    return out
