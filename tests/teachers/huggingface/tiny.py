"""Tiny random models of every family with processors and tokenizers, made from configurations."""

from __future__ import annotations

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = ["a", "dog", "runs", "cat", "sits", "on", "the", "grass", "man", "rides", "horse", "red"]
SIDE = 16
SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
IMAGE = {"image_token": "<image>"}


def words_tokenizer(*special: str, **roles: str):
    """Byte-level BPE with some whole words; special tokens come first."""
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in WORDS:
        for start in ("", "Ġ"):
            text = start + word
            for end in range(2, len(text) + 1):
                if (text[: end - 1], text[end - 1]) not in merges:
                    merges.append((text[: end - 1], text[end - 1]))
                    pieces.append(text[:end])
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def bert_tokenizer():
    """WordPiece with [CLS] and [SEP]; [DEC] is the last entry, as in BLIP."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(97, 123)]
    pieces = [*special, *dict.fromkeys([*WORDS, *letters]), *(f"##{letter}" for letter in letters)]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate([*pieces, "[DEC]"])}))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, **dict(zip(names, special, strict=True))
    )


def vision(**more):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return {**sizes, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8, **more}


def text(tokenizer, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 128}
    return {**sizes, **heads, "vocab_size": len(tokenizer), **more}


def vision_encoder_decoder():
    """As nlpconnect/vit-gpt2-image-captioning: one token is start, end and padding."""
    tokenizer = words_tokenizer(
        "<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    decoder = hf.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        n_inner=32,
        bos_token_id=0,
        eos_token_id=0,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**vision()), decoder
    )
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = 0
    image = hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    return hf.VisionEncoderDecoderModel(config), image, tokenizer


def blip():
    tokenizer = bert_tokenizer()
    ids = {"pad_token_id": 0, "sep_token_id": 3, "bos_token_id": len(tokenizer) - 1}
    text_config = text(tokenizer, encoder_hidden_size=16, eos_token_id=3, **ids)
    config = hf.BlipConfig(text_config=text_config, vision_config=vision())
    image = hf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = hf.BlipProcessor(image_processor=image, tokenizer=tokenizer)
    return hf.BlipForConditionalGeneration(config), processor, tokenizer


def git():
    tokenizer = bert_tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = hf.GitConfig(vision_config=vision(), **text(tokenizer, **ids))
    image = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return hf.GitForCausalLM(config), hf.GitProcessor(image, tokenizer), tokenizer


def blip2(language: str = "opt"):
    tokenizer = words_tokenizer("<pad>", "<s>", "</s>", "<image>", **SENTENCE)
    if language == "opt":
        own = {"ffn_dim": 32, "word_embed_proj_dim": 32, "do_layer_norm_before": True}
        text_config = hf.OPTConfig(**text(tokenizer, bos_token_id=1, eos_token_id=2, **own))
    else:
        text_config = hf.T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    former = {"encoder_hidden_size": 16, "vocab_size": 8, **vision(cross_attention_frequency=1)}
    config = hf.Blip2Config(
        vision_config=vision(),
        qformer_config=former,
        text_config=text_config.to_dict(),
        num_query_tokens=3,
        image_token_index=3,
    )
    image = hf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    module = hf.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(module.query_tokens)
    return module, hf.Blip2Processor(image, tokenizer, num_query_tokens=3), tokenizer


def florence2():
    tokenizer = words_tokenizer(
        "<s>", "<pad>", "</s>", "<image>", **SENTENCE, extra_special_tokens=IMAGE
    )
    side = {"embed_dim": [16], "num_heads": [2], "num_groups": [2], "depths": [1]}
    patches = {"patch_size": [7], "patch_stride": [4], "patch_padding": [3], "window_size": 2}
    config = hf.Florence2Config(
        vision_config={
            **side,
            **patches,
            "patch_prenorm": [False],
            "projection_dim": 32,
            "max_position_embeddings": 8,
        },
        text_config=hf.BartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=128,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_bos_token_id=0,
        ).to_dict(),
        image_token_id=3,
    )
    image = hf.CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
    )
    image.image_seq_length = 17
    module = hf.Florence2ForConditionalGeneration(config)
    module.generation_config.forced_bos_token_id = 0
    return module, hf.Florence2Processor(image, tokenizer), tokenizer


SMOL_CHAT = (
    "{% for m in messages %}User:{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
)


def smolvlm(tiles: bool = False):
    special = (
        "<pad>",
        "<s>",
        "<end_of_utterance>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<row_1_col_1>",
    )
    tokenizer = words_tokenizer(
        *special,
        bos_token="<s>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        additional_special_tokens=list(special[3:]),
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    language = text(tokenizer, num_key_value_heads=1, model_type="llama", **ids)
    config = hf.SmolVLMConfig(
        vision_config=vision(patch_size=4),  # 4 tokens: a multiple, as one version needs
        text_config=language,
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    image = hf.Idefics3ImageProcessor(  # SmolVLM's own needs num2words, for videos
        size={"longest_edge": 2 * SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=tiles,
    )
    processor = hf.Idefics3Processor(image, tokenizer, image_seq_len=4, chat_template=SMOL_CHAT)
    return hf.SmolVLMForConditionalGeneration(config), processor, tokenizer


QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>user\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def qwen2_vl():
    special = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    tokenizer = words_tokenizer(
        *special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special[3:]),
    )
    ids = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    language = text(
        tokenizer,
        num_key_value_heads=1,
        rope_parameters=rope,
        rope_scaling=rope,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        **ids,
    )
    eyes = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 1,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = hf.Qwen2VLConfig(
        text_config=language,
        vision_config=eyes,
        image_token_id=5,
        video_token_id=6,
        tie_word_embeddings=False,
        **ids,
    )
    image = hf.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=SIDE**2, max_pixels=SIDE**2
    )
    processor = hf.Qwen2VLProcessor(
        image, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=QWEN_CHAT
    )
    module = hf.Qwen2VLForConditionalGeneration(config)
    module.generation_config.eos_token_id = [2, 0]
    return module, processor, tokenizer


def paligemma():
    tokenizer = words_tokenizer(
        "<pad>", "<eos>", "<bos>", "<image>", **GEMMA, extra_special_tokens=IMAGE
    )
    image = hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    image.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(image, tokenizer)
    language = text(
        tokenizer,
        num_key_value_heads=1,
        head_dim=16,
        model_type="gemma",
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    config = hf.PaliGemmaConfig(
        vision_config=vision(model_type="siglip_vision_model", projection_dim=32),
        text_config=language,
        image_token_id=3,
        projection_dim=32,
        hidden_size=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor, tokenizer


def qwen3_vl():
    """Its image encoder feeds several layers of the language model."""
    _, processor, tokenizer = qwen2_vl()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    ids = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    language = text(
        tokenizer,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters={**rope, "rope_theta": 1e4},
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    sizes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    layers = {"intermediate_size": 16, "num_position_embeddings": 16}
    config = hf.Qwen3VLConfig(
        text_config=language,
        vision_config={**sizes, **patches, **layers, "deepstack_visual_indexes": [0]},
        image_token_id=5,
        video_token_id=6,
        tie_word_embeddings=False,
        **ids,
    )
    image, videos = processor.image_processor, hf.Qwen3VLVideoProcessor()
    processor = hf.Qwen3VLProcessor(image, tokenizer, videos, chat_template=QWEN_CHAT)
    return hf.Qwen3VLForConditionalGeneration(config), processor, tokenizer


def llava():
    tokenizer = words_tokenizer(
        "<pad>", "<s>", "</s>", "<image>", **SENTENCE, extra_special_tokens=IMAGE
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.LlavaConfig(
        vision_config=vision(model_type="clip_vision_model", projection_dim=16),
        text_config=text(tokenizer, num_key_value_heads=1, model_type="llama", **ids),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    image = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    how = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(image, tokenizer, patch_size=8, **how)
    return hf.LlavaForConditionalGeneration(config), processor, tokenizer


def gemma3():
    """The tokens of an image see each other; some layers see eight words back alone."""
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"}
    names["eoi_token"] = "<end_of_image>"
    tokenizer = words_tokenizer(
        "<pad>",
        "<eos>",
        "<bos>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
        **GEMMA,
        extra_special_tokens=names,
    )
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = hf.Gemma3Config(
        vision_config=vision(model_type="siglip_vision_model"),
        text_config=text(tokenizer, num_key_value_heads=1, head_dim=16, sliding_window=8, **ids),
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=3,
        eoi_token_index=4,
    )
    image = hf.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = hf.Gemma3Processor(image, tokenizer, image_seq_length=4)
    return hf.Gemma3ForConditionalGeneration(config), processor, tokenizer


FAMILIES = {
    "vision_encoder_decoder": vision_encoder_decoder,
    "blip": blip,
    "git": git,
    "blip2_opt": blip2,
    "blip2_t5": lambda: blip2("t5"),
    "florence2": florence2,
    "smolvlm": smolvlm,
    "smolvlm_tiles": lambda: smolvlm(tiles=True),
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "paligemma": paligemma,
    "llava": llava,
    "gemma3": gemma3,
}


def make(family: str):
    """(module, processor, tokenizer) of a family; weights large enough that inputs matter."""
    torch.manual_seed(0)
    module, processor, tokenizer = FAMILIES[family]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return module.eval(), processor, tokenizer
