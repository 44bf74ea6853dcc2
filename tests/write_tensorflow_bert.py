"""Writes tests/tensorflow_bert/: a tiny BERT as Google published the large ones.

    pip install tensorflow-cpu
    python -m tests.write_tensorflow_bert

The numbers come from a seed, so that a test knows them without reading the checkpoint.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "tensorflow_bert"
SEED = 3
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a man woman dog runs jump ##ing ##s on the red ball . ,"
# Sizes all differ, so that a matrix that is not transposed fits nowhere.
SIZES = {
    "vocab_size": len(WORDS.split()),
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def arrays() -> dict[str, np.ndarray]:
    """Every variable by TensorFlow's name; `kernel` is (inputs, outputs)."""
    h, m, words = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "bert/embeddings/word_embeddings": (words, h),
        "bert/embeddings/position_embeddings": (SIZES["max_position_embeddings"], h),
        "bert/embeddings/token_type_embeddings": (2, h),
        **norm("bert/embeddings"),
        **dense("bert/pooler/dense", h, h),
        **dense("cls/predictions/transform/dense", h, h),
        **norm("cls/predictions/transform"),
        "cls/predictions/output_bias": (words,),
        "cls/seq_relationship/output_weights": (2, h),
        "cls/seq_relationship/output_bias": (2,),
        "bert/embeddings/word_embeddings/adam_m": (words, h),
        "bert/embeddings/word_embeddings/adam_v": (words, h),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        where = f"bert/encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            shapes |= dense(f"{where}/attention/self/{part}", h, h)
        shapes |= dense(f"{where}/attention/output/dense", h, h) | norm(f"{where}/attention/output")
        shapes |= dense(f"{where}/intermediate/dense", h, m)
        shapes |= dense(f"{where}/output/dense", m, h) | norm(f"{where}/output")
    rng = np.random.default_rng(SEED)
    variables = {k: rng.normal(0, 0.5, shape).astype(np.float32) for k, shape in shapes.items()}
    return variables | {"global_step": np.int64(1000)}


def dense(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    width = SIZES["hidden_size"]
    return {f"{name}/LayerNorm/gamma": (width,), f"{name}/LayerNorm/beta": (width,)}


def write(folder: Path) -> None:
    import tensorflow as tf

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    config = {"hidden_act": "gelu", "initializer_range": 0.02, "hidden_dropout_prob": 0.1}
    config |= {"attention_probs_dropout_prob": 0.1} | SIZES
    (folder / "bert_config.json").write_text(json.dumps(config, indent=1) + "\n")
    names, values = zip(*sorted(arrays().items()), strict=True)
    everything = [""] * len(names)
    tensors = [tf.constant(value) for value in values]
    prefix = str(folder / "bert_model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=names, shape_and_slices=everything, tensors=tensors
    )


if __name__ == "__main__":
    write(FOLDER)
