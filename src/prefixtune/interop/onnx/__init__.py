"""A prefix for ONNX Runtime and OpenVINO: the backbone as a graph whose past is an input, and the prefix as that past.

export   traces the graph, and compares it with the backbone
run      the script that is exported with the graph; it needs numpy, and something that runs the graph
"""
