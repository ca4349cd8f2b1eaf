"""What the README says of the methods; scripts/update_docs.py draws its table from this."""

# What a method does in at most eight words, for the README.
IN_SHORT = {
    "apiq": "learns clipping and a low-rank adapter together",
    "awq": "scales important channels before rounding",
    "bitstack": "stacks sign matrices; load any size",
    "blockpruner": "removes attention and MLP blocks by perplexity",
    "flap": "removes heads and neurons that fluctuate least",
    "float": "rounds to FP8, MXFP4 or NVFP4",
    "gptq": "rounds column by column, compensating each error",
    "harry-potter": "learns generic predictions for the text to forget",
    "hqq": "fits grids to weights, without text",
    "key-space": "refuses prompts like those to forget",
    "kprune": "removes heads and neurons, refits the rest",
    "llm-int8": "8-bit multiplication, outlier channels kept",
    "llm-qat": "trains weights, inputs and key-value cache",
    "magnitude": "removes heads and neurons with small weights",
    "nested": "one code for all widths; load any size",
    "neuron-adjust": "maps neurons to retained text at inference",
    "nf4": "rounds to NormalFloat4, as in QLoRA",
    "replaceme": "replaces layers by one linear map",
    "rtn": "rounds to nearest, in seconds",
    "s3t": "deletes records exactly, without training again",
    "shortgpt": "removes the layers that change least",
    "wanda-sp": "removes small weights times small inputs",
}
MOST_WORDS = 8

# Methods of unlearning that share one row of the README: they are there to be compared with.
GRADIENT_METHODS = ("gradient-difference", "npo", "simnpo", "rmu", "undial", "dpo", "sure")
