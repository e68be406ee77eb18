"""Models: loading, adapters, unwrapping, saving.

loading           models and tokenizers of a recipe, a directory or a name
  from_pretrained   all calls of from_pretrained: complete, from safetensors, no remote code
  from_config       configurations and random weights
  weight_files      the safetensors files of a directory, and their headers
  preload_checks    whether a model fits, before its weights are read
quantization      frozen weights in 4 bits (QLoRA), and back
multimodal        checkpoints with towers, trained on text
reward_model      a language model with another head: a sequence classifier that scores responses
adapters          PEFT adapters: created, loaded, merged
  adapter_methods   which methods can be trained
  adapter_parts     modules that an adapter must train and save in full: new heads
  adapter_files     adapters on disk: their base model, and whether they are complete
sharding          sharded weights: gathering, naming and saving them in full
dtypes            frozen weights in the dtype of the arithmetic, trained ones in float32
unwrap            the transformers model inside DDP, FSDP, DeepSpeed and PEFT
delivered         a model directory copied in another dtype
saved_files       files saved next to the weights: end tokens, generation config, tokenizer, processor
"""
