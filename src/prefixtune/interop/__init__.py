"""Other programs' formats, read and written.

    peft                          PEFT's adapters
    hub                           prefixes and model cards on the Hugging Face hub
    trainer, collator             training inside transformers' `Trainer` and TRL
    export, llama_cpp, onnx       prefixes for other runtimes
    lm_eval                       lm-eval measures a backbone with prefixes
    vllm                          prefixes in vLLM; runs in vLLM's environment

Importing this package loads none of these programs.
"""
