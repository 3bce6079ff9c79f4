# The cells of recurrent layers multiply with two matrices, Wi * x and Wh * h, and take anything for them that can be
# multiplied so: in their place a PrunableDense without bias is all that it takes to prune them.

const Cell = Union{Flux.RNNCell,Flux.LSTMCell,Flux.GRUCell,Flux.GRUv3Cell}

"The cell with `f` applied to each of its fields."
with_matrices(f, cell) = Base.typename(typeof(cell)).wrapper(map(name -> f(getfield(cell, name)), fieldnames(typeof(cell)))...)

Base.:*(layer::PrunableDense, x::AbstractVecOrMat) = layer(x)
Base.size(layer::PrunableDense, dims...) = size(layer.dense.weight, dims...)
MLUtils.zeros_like(layer::PrunableDense, dims...) = MLUtils.zeros_like(layer.dense.weight, dims...)
