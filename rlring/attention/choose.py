"""The rule behind scheme="auto". It depends only on shapes and mesh, so that every run makes the same choice."""

GATHERED_BYTES = 2**30  # limit for a device's gathered keys, values and their float32 gradients of the whole sequence


def choose_scheme(
    *, length: int, heads: int, kv_heads: int, head_size: int, itemsize: int, batch: int, ring: int, ulysses: int
) -> str:
    """Returns the scheme for keys of `length` tokens on a mesh; `batch` is the batch of one device.

    1. If the sequence is not split: "blockwise".
    2. If it is split over ulysses and the heads are divisible: "ulysses", or "hybrid" if there is a ring as well. An
       all-to-all sends only a share of what the other schemes send, and leaves one large local computation.
    3. If the gathered keys and values with their gradients fit into GATHERED_BYTES: "all_gather". It has one collective
       instead of one per step of the ring. python -m rlring.bench --schemes auto ring all_gather compares the two.
    4. Otherwise "ring", whose memory does not grow with the number of devices. The ring cannot use an ulysses axis, so
       on a mesh with one over which the heads are not divisible, the scheme is still "all_gather".
    """
    if ring * ulysses == 1:
        return "blockwise"
    divides = heads % ulysses == 0 and (kv_heads % ulysses == 0 or ulysses % kv_heads == 0)
    if ulysses > 1 and divides:
        return "hybrid" if ring > 1 else "ulysses"
    gathered = 2 * batch * length * kv_heads * head_size * (itemsize + 4)
    return "ring" if gathered > GATHERED_BYTES and ulysses == 1 else "all_gather"
