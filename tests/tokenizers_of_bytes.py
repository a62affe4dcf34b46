"""A tokenizer of bytes for tiny models that other people's tools ask for one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf


def save_byte_tokenizer(folder: Path) -> None:
    """259 tokens, with a chat template that only joins the messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(8)), "▁the", "é", "▁"]


def sentencepiece_model(*more: str) -> bytes:
    """A tokenizer.model of ``PIECES`` and more, of which no text is made tokens."""
    proto = import_protobuf().ModelProto()
    for number, piece in enumerate((*PIECES, *more)):
        proto.pieces.add(piece=piece, score=-number, type=3 if number < 3 else 1)
    proto.trainer_spec.model_type = 2
    proto.normalizer_spec.name = "identity"
    return bytes(proto.SerializeToString())
