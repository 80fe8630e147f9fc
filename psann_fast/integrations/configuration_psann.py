"""Configuration of a PSANN language model for transformers. Self-contained: exported models carry this file."""

from transformers import PreTrainedConfig


class PSANNConfig(PreTrainedConfig):
    """Sizes by transformers' names, the rest by psann-fast's.

    base                  "respsann", or "waveresnet", whose blocks have a wave branch over time
    positional_encoding   "rope" (adjacent pairs turn), "alibi" or "sinusoidal"
    rotary_theta          base of the rotary wavelengths
    dropout               after embedding and projections
    wave_kernel, wave_dilations   taps of the wave branch; dilations, taken in turn by the layers
    sine                  mode ("abs", "relu", "none"), learnable (names), bounds {name: [least, largest]}, and for fresh weights
                          amplitude, frequency, damping and their *_std
    separator_token_id    this id is a document of its own, and the tokens after it see neither it nor what is before; None: no id
                          is. Through a cache, generate keeps to it; continuous batching, and forward with a cache, see only the
                          separators among the new tokens
    """

    model_type = "psann"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=None,
        intermediate_size=None,
        max_position_embeddings=1024,
        base="waveresnet",
        positional_encoding="rope",
        rotary_theta=10000.0,
        dropout=0.0,
        wave_kernel=4,
        wave_dilations=(1, 2, 4),
        sine=None,
        separator_token_id=None,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if base not in ("respsann", "waveresnet"):
            raise ValueError(f"PSANNConfig: base is {base!r}; it must be 'respsann' or 'waveresnet'")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.base = base
        self.positional_encoding = positional_encoding
        self.rotary_theta = rotary_theta
        self.dropout = dropout
        self.wave_kernel = wave_kernel
        self.wave_dilations = list(wave_dilations)
        self.sine = sine or {}
        self.separator_token_id = separator_token_id
        self.use_cache = use_cache
        # What a cache keeps for each layer: keys and values, and with a wave branch its last inputs.
        self.layer_types = ["hybrid" if base == "waveresnet" else "full_attention"] * num_hidden_layers
        kwargs.pop("layer_types", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
