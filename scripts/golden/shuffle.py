"""Prints the partition that tests/partition_test.cpp expects for H = 16, E = 4, seed 7.

An independent implementation: MT19937-64 (Matsumoto and Nishimura, 2004), draws without bias by
rejection, Fisher-Yates from the end.
"""

MASK = (1 << 64) - 1


def mt19937_64(seed):
    state = [seed & MASK]
    for i in range(1, 312):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & MASK)
    while True:
        for i in range(312):
            x = (state[i] & 0xFFFFFFFF80000000) | (state[(i + 1) % 312] & 0x7FFFFFFF)
            state[i] = state[(i + 156) % 312] ^ (x >> 1) ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        for x in list(state):
            x ^= (x >> 29) & 0x5555555555555555
            x ^= (x << 17) & 0x71D67FFFEDA60000 & MASK
            x ^= (x << 37) & 0xFFF7EEE000000000 & MASK
            yield x ^ (x >> 43)


def bounded(stream, bound):
    limit = MASK - MASK % bound
    while (draw := next(stream)) >= limit:
        pass
    return draw % bound


def main(hidden=16, experts=4, seed=7):
    stream = mt19937_64(seed)
    order = list(range(hidden))
    for i in range(hidden, 1, -1):
        j = bounded(stream, i)
        order[i - 1], order[j] = order[j], order[i - 1]
    expert_of = [0] * hidden
    for place, neuron in enumerate(order):
        expert_of[neuron] = place // (hidden // experts)
    print(", ".join(map(str, expert_of)))


if __name__ == "__main__":
    main()
