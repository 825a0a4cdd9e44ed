class Foreach:
    def __init__(self, layers):
        raise NotImplementedError
