"""Which scheme scheme="auto" is: a rule on shapes and mesh alone, so that every run chooses the same."""

GATHERED_BYTES = 2**30  # of keys, values and their float32 gradients that a device may hold for the whole sequence


def choose_scheme(
    *, length: int, heads: int, kv_heads: int, head_size: int, itemsize: int, batch: int, ring: int, ulysses: int
) -> str:
    """Returns the scheme for keys of this many tokens on this mesh; batch is that of one device.

    1. The sequence is not split: "blockwise".
    2. It is split over ulysses, and the heads divide: "ulysses", or "hybrid" where there is a ring as well. An
       all-to-all moves a share of what the others move, and leaves one large local problem.
    3. The gathered keys and values with their gradients fit into GATHERED_BYTES: "all_gather". One collective instead
       of one a hop; python -m rlring.bench --schemes auto ring all_gather measures it against the ring.
    4. Else the ring, whose memory does not grow with the number of devices; on a mesh with an ulysses axis over which
       the heads do not divide there is none, and it stays with "all_gather".
    """
    if ring * ulysses == 1:
        return "blockwise"
    divides = heads % ulysses == 0 and (kv_heads % ulysses == 0 or ulysses % kv_heads == 0)
    if ulysses > 1 and divides:
        return "hybrid" if ring > 1 else "ulysses"
    gathered = 2 * batch * length * kv_heads * head_size * (itemsize + 4)
    return "ring" if gathered > GATHERED_BYTES and ulysses == 1 else "all_gather"
