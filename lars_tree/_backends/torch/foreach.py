class Foreach:
    name = "foreach"
    def __init__(self, layers):
        raise NotImplementedError
