"""Texts get the features that the package sentence-transformers gives them, equal to 1e-4.

Each row of LIBRARY is a tiny random model that the package saves and encodes with. The rows of
LEGACY are files as they lie on the hub. What they must give is also computed by transformers' own
calls, so that these rows need no such package."""
import json

import pytest
import torch
from PIL import Image

from src.encoder_sources import load_encoder
from src.encoders import Encoders
from src.utils.errors import UsageError
from tests.conftest import edit_json, word_tokenizer

pytestmark = pytest.mark.extra
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             vocab_size=40, max_position_embeddings=24, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
              image_size=32, patch_size=8)
TEXTS = ["a red circle", "A circle above a Blue SQUARE", "green", "the small circle " * 20]


def bert(t):
    return t.BertModel(t.BertConfig(**SMALL), add_pooling_layer=False)


def roberta(t):
    return t.RobertaModel(t.RobertaConfig(**SMALL))


def distilbert(t):
    return t.DistilBertModel(t.DistilBertConfig(
        vocab_size=40, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=24))


def qwen(t):
    return t.Qwen2Model(t.Qwen2Config(**SMALL, num_key_value_heads=1))


def gemma(t):
    return t.Gemma3TextModel(t.Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, use_bidirectional_attention=True))


def t5(t):
    return t.T5Model(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1,
                                num_heads=2, decoder_start_token_id=0))


def bart(t):
    return t.BartModel(t.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        max_position_embeddings=24, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2))


def clip(t):
    return t.CLIPModel(t.CLIPConfig(text_config=SMALL, vision_config=VISION, projection_dim=12))


def save(folder, make_model, **tokenizer_changes):
    """Save a tiny random model of transformers with its tokenizer, which adds [EOS]."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    word_tokenizer(folder)
    if tokenizer_changes:
        edit_json(folder / "tokenizer_config.json", **tokenizer_changes)
    torch.manual_seed(0)
    model = make_model(transformers).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def pool(modes, **options):
    return lambda modules: modules.Pooling(16, modes, **options)


def dense(width, activation=torch.nn.Tanh, **options):
    return lambda modules: modules.Dense(
        16, width, activation_function=activation(), **options)


def normalize(modules):
    return modules.Normalize()


# For each: the transformer, the modules after it, and options: those of SentenceTransformer, those
# of the Transformer, or a change of the tokenizer.
LIBRARY = {
    "BGE, GTE, Arctic": (bert, [pool("cls"), normalize], {}),
    "MiniLM": (bert, [pool("mean"), normalize], dict(max_seq_length=7)),
    "maximum": (roberta, [pool("max")], {}),
    "square root": (bert, [pool("mean_sqrt_len_tokens")], {}),
    "weighted": (qwen, [pool("weightedmean")], {}),
    "several": (bert, [pool(["weightedmean", "cls", "lasttoken", "mean", "max"])], {}),
    "Qwen3-Embedding": (qwen, [pool("lasttoken"), normalize], {}),
    "padded left": (qwen, [pool(["lasttoken", "cls", "weightedmean", "mean"]), normalize],
                    dict(padding_side="left")),
    "EmbeddingGemma": (gemma, [pool("mean"), dense(24, torch.nn.Identity, bias=False),
                               lambda modules: modules.Dense(24, 8, bias=False), normalize],
                       dict(prompts={"query": "a red "}, default_prompt_name="query")),
    "LaBSE": (bert, [pool("cls"), dense(16), normalize], {}),
    "multilingual CLIP": (distilbert, [pool("mean"), dense(12, torch.nn.Identity, bias=False)], {}),
    "sentence-t5": (t5, [pool("mean"), dense(12, torch.nn.Identity, bias=False), normalize], {}),
    "BART": (bart, [pool("mean")], {}),
    "E5, no default": (bert, [pool("mean")], dict(prompts={"query": "a red "})),
    "prompt left out": (bert, [pool(["cls", "mean", "lasttoken", "weightedmean"],
                                    include_prompt=False)],
                        dict(prompts={"own": "a red "}, default_prompt_name="own")),
    "prompt left out, padded left": (
        qwen, [pool(["cls", "mean", "lasttoken", "weightedmean"], include_prompt=False)],
        dict(prompts={"own": "a red "}, default_prompt_name="own", padding_side="left")),
    "Matryoshka": (bert, [pool("mean"), normalize], dict(truncate_dim=5)),
    "LayerNorm": (bert, [pool("mean"), lambda modules: modules.Dropout(0.5),
                         lambda modules: modules.LayerNorm(16)], {}),
    "residual": (bert, [pool("mean"), dense(16, torch.nn.GELU, use_residual=True),
                        dense(12, torch.nn.PReLU, use_residual=True)], {}),
}


@pytest.mark.parametrize("row", LIBRARY)
@torch.no_grad()
def test_features_are_those_of_the_package(row, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules
    make_model, layers, options = LIBRARY[row]
    options = dict(options)
    tokenizer_changes = {key: options.pop(key) for key in ("padding_side",) if key in options}
    save(tmp_path / "base", make_model, **tokenizer_changes)
    transformer = modules.Transformer(
        str(tmp_path / "base"), max_seq_length=options.pop("max_seq_length", None))
    torch.manual_seed(1)
    package.SentenceTransformer(
        modules=[transformer, *(make(modules) for make in layers)], device="cpu",
        **options).save_pretrained(str(tmp_path / "model"))
    compare(package, tmp_path / "model")


def compare(package, folder):
    model = package.SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    encoder = load_encoder(str(folder), "text")
    assert encoder.width == expected.shape[1]
    assert torch.allclose(encoder(encoder.prepare(TEXTS)), expected, atol=1e-4)
    for text, row in zip(TEXTS, expected):
        assert torch.allclose(encoder(encoder.prepare([text]))[0], row, atol=1e-4)
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)
    return encoder


def write_modules(folder, modules, **files):
    """Write the files of an older model around a transformer. modules: {path: class};
    files: {path: content}."""
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path,
         "type": kind if "." in kind else f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules.items())]))
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))


def hidden_states(folder, model, texts, **options):
    """Return (hidden (B, T, width), mask (B, T, 1)) by transformers' own calls."""
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", **options)
    tokens.pop("token_type_ids", None)
    return model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]


def mean(hidden, mask):
    return (hidden * mask).sum(1) / mask.sum(1)


FLAGS = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False,
         "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False,
         "pooling_mode_mean_sqrt_len_tokens": False}
# For each: the flags of its pooling, other files, and its features from hidden states and mask.
LEGACY = {
    "mean": (dict(pooling_mode_mean_tokens=True), {}, mean),
    "CLS and its first tokens": (
        dict(pooling_mode_cls_token=True),
        {"sentence_bert_config.json": {"max_seq_length": 5, "do_lower_case": False}},
        lambda hidden, mask: hidden[:, 0]),
    "maximum": (dict(pooling_mode_max_tokens=True), {},
                lambda hidden, mask: hidden.masked_fill(mask == 0, -9e9).amax(1)),
    "lower case": (dict(pooling_mode_mean_tokens=True),
                   {"sentence_bert_config.json": {"max_seq_length": 9, "do_lower_case": True}},
                   mean),
    "a file with another name": (
        dict(pooling_mode_mean_tokens=True),
        {"sentence_roberta_config.json": {"max_seq_length": 4, "do_lower_case": False}}, mean),
    "several": (dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True), {},
                lambda hidden, mask: torch.cat([hidden[:, 0], mean(hidden, mask)], 1)),
    "no flag": ({}, {}, mean),
    "both styles": (dict(pooling_mode_mean_tokens=True, pooling_mode="cls"), {},
                    lambda hidden, mask: hidden[:, 0]),
    "prompt": (dict(pooling_mode_mean_tokens=True),
               {"config_sentence_transformers.json": {
                   "prompts": {"query": "the small "}, "default_prompt_name": "query"}}, mean),
}


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
@pytest.mark.parametrize("row", LEGACY)
@torch.no_grad()
def test_older_files_are_read(row, subfolder, tmp_path):
    flags, files, features_of = LEGACY[row]
    model = save(tmp_path / "model" / subfolder, bert)
    write_modules(tmp_path / "model", {subfolder: "Transformer", "1_Pooling": "Pooling"},
                  **{"1_Pooling/config.json": FLAGS | flags})
    config = {}
    for file, content in files.items():
        where = subfolder if file != "config_sentence_transformers.json" else ""
        (tmp_path / "model" / where / file).write_text(json.dumps(content))
        config |= content
    texts = [config.get("prompts", {"query": ""})["query"] + text for text in TEXTS]
    if config.get("do_lower_case"):
        texts = [text.lower() for text in texts]
    expected = features_of(*hidden_states(tmp_path / "model" / subfolder, model, texts,
                                          max_length=config.get("max_seq_length", 20)))
    encoder = load_encoder(str(tmp_path / "model"), "text")
    assert torch.allclose(encoder(encoder.prepare(TEXTS)), expected, atol=1e-4)
    try:
        import sentence_transformers
    except ImportError:
        return
    compare(sentence_transformers, tmp_path / "model")


@pytest.mark.parametrize("style", ["CLIPModel", "Transformer and Normalize"])
@torch.no_grad()
def test_an_image_text_model_is_a_pair(style, tmp_path):
    folder = tmp_path / "model"
    subfolder = folder / "0_CLIPModel" if style == "CLIPModel" else folder
    model = save(subfolder, clip)
    import transformers
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={
        "height": 32, "width": 32}).save_pretrained(subfolder)
    if style == "CLIPModel":
        write_modules(folder, {"0_CLIPModel": "CLIPModel"})
    else:
        outputs = {part: {"method": f"get_{part}_features", "method_output_name": "pooler_output"}
                   for part in ("image", "text")}
        write_modules(folder, {"": "Transformer", "1_Normalize": "Normalize"}, **{
            "sentence_bert_config.json": {"modality_config": outputs}})
    image, text = (load_encoder(str(folder), modality) for modality in ("image", "text"))
    assert Encoders(image, text).is_contrastive_pair
    photos = torch.stack([image.prepare(Image.effect_noise((60, 40), sigma).convert("RGB"))
                          for sigma in (20, 90)])
    tokens = text.prepare(TEXTS[:3])
    expected = model(pixel_values=photos, **tokens)
    for features, right in ((image(photos), expected.image_embeds),
                            (text(tokens), expected.text_embeds)):
        if style == "CLIPModel":  # transformers' own are of unit length
            assert not torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-2)
            features = torch.nn.functional.normalize(features)
        assert torch.allclose(features, right, atol=1e-4)


def cls_model(folder, **files):
    """Save a model that takes CLS. Return what transformers gives for it."""
    model = save(folder, bert)
    files = {"1_Pooling/config.json": FLAGS | {"pooling_mode_cls_token": True}} | files
    write_modules(folder, {"": "Transformer", "1_Pooling": "Pooling"}, **files)
    return model


def add_dense(folder, kind="Dense", **config):
    from safetensors.torch import save_file
    torch.manual_seed(1)
    weights = {"linear.weight": torch.randn(8, 16), "linear.bias": torch.randn(8)}
    write_modules(folder, {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": kind},
                  **{"2_Dense/config.json": dict(in_features=16, out_features=8) | config})
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    return weights


def test_a_dense_layer_is_trained_and_told_by_its_weights(tmp_path):
    model = cls_model(tmp_path / "model")
    weights = add_dense(tmp_path / "model", bias=True,
                        activation_function="torch.nn.modules.activation.Tanh")
    encoder = load_encoder(str(tmp_path / "model"), "text")
    with torch.no_grad():
        hidden, _ = hidden_states(tmp_path / "model", model, TEXTS)
        expected = (hidden[:, 0] @ weights["linear.weight"].T + weights["linear.bias"]).tanh()
        assert torch.allclose(encoder(encoder.prepare(TEXTS)), expected, atol=1e-4)
    assert encoder.rule == "CLS, Dense, from its modules.json"
    encoder.freeze_unused()
    trained = [name for name, weight in encoder.named_parameters() if weight.requires_grad]
    assert any("layers.0.linear" in name for name in trained) and len(trained) > 10
    from safetensors.torch import save_file
    save_file(weights | {"linear.bias": torch.zeros(8)},
              tmp_path / "model" / "2_Dense" / "model.safetensors")
    again = load_encoder(str(tmp_path / "model"), "text")
    assert again.weights_hash != encoder.weights_hash
    assert again.preprocessing_hash == encoder.preprocessing_hash


@pytest.mark.parametrize("file, change", [
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
    ("sentence_bert_config.json", {"max_seq_length": 6}),
    ("sentence_bert_config.json", {"do_lower_case": True}),
    ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
    ("config_sentence_transformers.json", {"truncate_dim": 8})])
def test_a_changed_file_makes_another_key(file, change, tmp_path):
    cls_model(tmp_path / "model", **{
        "sentence_bert_config.json": {"max_seq_length": 12},
        "config_sentence_transformers.json": {"prompts": {"query": "a red "}}})
    before = load_encoder(str(tmp_path / "model"), "text")
    edit_json(tmp_path / "model" / file, **change)
    after = load_encoder(str(tmp_path / "model"), "text")
    assert after.weights_hash == before.weights_hash
    assert after.preprocessing_hash != before.preprocessing_hash


def test_cut_texts_are_counted_with_their_prompt(tmp_path):
    cls_model(tmp_path / "model", **{
        "sentence_bert_config.json": {"max_seq_length": 10},
        "config_sentence_transformers.json": {
            "prompts": {"query": "a small "}, "default_prompt_name": "query"}})
    encoder = load_encoder(str(tmp_path / "model"), "text")
    assert encoder.max_tokens == 8  # which is one of [EOS] and seven of the text
    assert encoder.count_cut(["red " * 7, "red " * 8]) == 1
    assert encoder.rule.startswith('CLS, from its modules.json with the prompt "a small "')
    edit_json(tmp_path / "model" / "sentence_bert_config.json", max_seq_length=2)
    encoder = load_encoder(str(tmp_path / "model"), "text")
    assert encoder.max_tokens == 1  # [EOS], as the prompt leaves no room for a text
    edit_json(tmp_path / "model" / "config_sentence_transformers.json", default_prompt_name=None)
    encoder = load_encoder(str(tmp_path / "model"), "text")
    assert encoder.rule.startswith(
        'CLS, from its modules.json without a prompt such as "a small "')


def test_a_folder_without_modules_gives_the_mean(tmp_path):
    model = save(tmp_path / "model", bert)
    encoder = load_encoder(str(tmp_path / "model"), "text")
    with torch.no_grad():
        expected = mean(*hidden_states(tmp_path / "model", model, TEXTS))
        assert torch.allclose(encoder(encoder.prepare(TEXTS)), expected, atol=1e-4)
    assert encoder.rule == "the mean over tokens"


REFUSED = {
    "WordEmbeddings": ({"0_WordEmbeddings": "WordEmbeddings", "1_Pooling": "Pooling"}, {},
                       "has the module sentence_transformers.models.WordEmbeddings, which"),
    "StaticEmbedding": ({"": "StaticEmbedding"}, {}, "StaticEmbedding, which this project"),
    "Router": ({"": "sentence_transformers.base.modules.router.Router"}, {}, "router.Router,"),
    "custom code": ({"": "custom_st.Transformer", "1_Pooling": "Pooling"}, {},
                    "has the module custom_st.Transformer, which"),
    "no pooling": ({"": "Transformer"}, {}, "has no module Pooling after its Transformer"),
    "weighted layers": ({"": "Transformer", "1_W": "WeightedLayerPooling"}, {},
                        "WeightedLayerPooling, which"),
    "another pooling": (None, {"1_Pooling/config.json": {"pooling_mode": "attention"}},
                        "pools tokens by attention, which"),
    "no configuration": ({"": "Transformer", "2_Pooling": "Pooling"}, {},
                         "lacks 2_Pooling/config.json"),
    "normalized first": ({"": "Transformer", "2_N": "Normalize", "1_Pooling": "Pooling"}, {},
                         "has no module Pooling after"),
    "reranker": (None, {"sentence_bert_config.json": {
        "transformer_task": "sequence-classification"}}, "for sequence-classification, which"),
    "chat": (None, {"sentence_bert_config.json": {"modality_config": {
        "text": {"method": "forward", "method_output_name": "last_hidden_state"},
        "message": {"method": "forward", "method_output_name": "last_hidden_state"}}}},
             "puts texts into a chat template"),
    "option": (None, {"sentence_bert_config.json": {"model_args": {"attention": 3}}},
               "has the option attention, which"),
    "a folder elsewhere": ({"": "Transformer", "../1_Pooling": "Pooling"}, {},
                           "names the folder ../1_Pooling, which"),
    "nothing": ({}, {}, "does not begin with a Transformer"),
    "options of the tokenizer": (None, {"sentence_bert_config.json": {
        "processing_kwargs": {"text": {"max_length": 5}}}}, "has the option processing_kwargs"),
    "no such prompt": (None, {"config_sentence_transformers.json": {
        "default_prompt_name": "passage"}}, "lacks its default prompt passage"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_unknown_is_refused(row, tmp_path):
    modules, files, message = REFUSED[row]
    cls_model(tmp_path / "model", **files)
    if modules is not None:
        write_modules(tmp_path / "model", modules)
    with pytest.raises(UsageError) as caught:
        load_encoder(str(tmp_path / "model"), "text")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config, message", [
    (dict(activation_function="os.system"), "a Dense with the activation os.system, which"),
    (dict(activation_function="torch.nn.modules.container.Sequential"), "container.Sequential"),
    (dict(activation_function="torch.load"), "activation torch.load, which"),
    (dict(module_input_name="token_embeddings"), "has a Dense for token_embeddings, which"),
    (dict(out_features=9), "do not fit its config.json")])
def test_a_dense_layer_that_is_unknown_is_refused(config, message, tmp_path):
    cls_model(tmp_path / "model")
    add_dense(tmp_path / "model", **config)
    with pytest.raises(UsageError) as caught:
        load_encoder(str(tmp_path / "model"), "text")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_in_a_bin_file_are_refused(tmp_path):
    cls_model(tmp_path / "model")
    weights = add_dense(tmp_path / "model")
    torch.save(weights, tmp_path / "model" / "2_Dense" / "pytorch_model.bin")
    (tmp_path / "model" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks 2_Dense/model.safetensors; a .bin file could run"):
        load_encoder(str(tmp_path / "model"), "text")


def test_damaged_files_in_subfolders_are_named(tmp_path):
    cls_model(tmp_path / "model")
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="1_Pooling/config.json is damaged"):
        load_encoder(str(tmp_path / "model"), "text")


@pytest.mark.parametrize("content", ['{"a": 1}', '[{"idx": 0}]', '[3]'])
def test_another_modules_json_is_refused(content, tmp_path):
    cls_model(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text(content)
    with pytest.raises(UsageError, match="is not as sentence-transformers writes it"):
        load_encoder(str(tmp_path / "model"), "text")


def test_the_folder_of_the_transformer_is_the_one_whose_faults_are_told(tmp_path):
    save(tmp_path / "model" / "0_Transformer", bert)
    write_modules(tmp_path / "model", {"0_Transformer": "Transformer", "1_Pooling": "Pooling"},
                  **{"1_Pooling/config.json": FLAGS})
    weights = tmp_path / "model" / "0_Transformer" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UsageError, match="in a .bin file, which could run code"):
        load_encoder(str(tmp_path / "model"), "text")


def test_a_text_model_is_no_encoder_of_photos(tmp_path):
    cls_model(tmp_path / "model")
    with pytest.raises(UsageError, match="does not encode images"):
        load_encoder(str(tmp_path / "model"), "image")
