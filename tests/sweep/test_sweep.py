"""Sixty architectures of the sweep, one or two of each kind; ``make sweep`` runs all of them."""

from __future__ import annotations

import pytest

from sweep import graphs, run, shrink

pytestmark = pytest.mark.slow

SAMPLE = """
    AlbertForMaskedLM BertForSequenceClassification CamembertForTokenClassification CanineModel
    DebertaV2Model DistilBertForQuestionAnswering ElectraForPreTraining FNetModel FunnelModel
    LongformerModel MPNetModel ModernBertForMaskedLM NomicBertModel RobertaForMultipleChoice
    RoFormerModel XLNetModel BloomForCausalLM FalconForCausalLM Gemma3ForCausalLM GPT2LMHeadModel
    GPTNeoXForCausalLM LlamaForCausalLM MambaForCausalLM MistralForSequenceClassification
    Phi3ForCausalLM Qwen3ForCausalLM RwkvForCausalLM AXK1ForCausalLM DeepseekV3ForCausalLM
    GptOssForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM BartForConditionalGeneration
    MarianMTModel MT5ForConditionalGeneration PegasusModel ProphetNetModel
    T5ForConditionalGeneration UMT5EncoderModel BeitForImageClassification ConvNextModel
    DeiTForImageClassification DetrForObjectDetection Dinov2Model MobileNetV2Model
    ResNetForImageClassification SegformerForSemanticSegmentation SwinModel ViTModel
    ASTForAudioClassification EncodecModel HubertForCTC Wav2Vec2ForCTC
    WhisperForConditionalGeneration BlipForConditionalGeneration CLIPModel LayoutLMv3Model
    LlavaForConditionalGeneration SiglipModel VisionTextDualEncoderModel
""".split()  # fmt: skip


@pytest.fixture(scope="module")
def sweeping():
    with run.sweeping() as opened:
        yield opened


@pytest.fixture(scope="module")
def model_types():
    return shrink.architectures()


def test_sample_is_of_sixty_classes():
    assert len(set(SAMPLE)) == 60


@pytest.mark.parametrize("class_name", SAMPLE)
def test_comes_back_bit_for_bit_in_a_clean_process(class_name, model_types, sweeping):
    if class_name not in model_types:
        pytest.skip("not in this release of transformers")
    row = run.check(class_name, model_types[class_name], *sweeping)
    # XLNet and its like cannot run in bfloat16 at all; nothing in this sample may be left out of
    # float32.
    assert row["float32"]["result"] == "equal", row["float32"]
    assert row["bfloat16"]["result"] in ("equal", "left out"), row["bfloat16"]


@pytest.mark.parametrize(
    "class_name", ["BertForSequenceClassification", "ViTForImageClassification"]
)
def test_its_forward_is_a_graph_of_the_same_bits(class_name, model_types):
    row = graphs.check(class_name, model_types[class_name])
    assert row["result"] == "proven", row
    assert row["fresh"] == graphs.FRESH


def test_what_writes_is_no_encoder():
    names = [name for name, _ in graphs.encoders()]
    assert "BertModel" in names
    assert not {"GPT2LMHeadModel", "T5ForConditionalGeneration", "LlamaForCausalLM"} & set(names)
