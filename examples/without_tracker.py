"""No tracker needed: the recording has everything, and a JSON-lines file can be followed with ``tail -f``."""

import memtrack


@memtrack.phase("load")
def load():
    return [bytearray(1 << 20) for _ in range(100)]


def main():
    with memtrack.start(sinks=["jsonl"], interval="200ms") as monitor:
        blocks = load()
        with memtrack.phase("train"):
            for step in range(2_000):
                memtrack.step(step)
                blocks[step % 100] = bytearray(1 << 20)
            with memtrack.phase("validate"):
                copies = [bytes(block) for block in blocks]
        memtrack.mark("validated", len(copies))
    print(monitor.summary())
    print(f"recording  {monitor.path}\nseries     {monitor.path.replace('.mtk', '.jsonl')}")


if __name__ == "__main__":
    main()
