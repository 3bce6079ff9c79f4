"""
    prunable(model)

The same model with every `Dense` and `Conv` in it, at any depth, as a [`PrunableDense`](@ref) or
[`PrunableConv`](@ref) with nothing pruned, and with a `PrunableDense` for each of the two matrices of an `RNNCell`,
`LSTMCell`, `GRUCell` and `GRUv3Cell`. Other layers are left alone, tied layers stay tied, and parameters are shared, not
copied.

# Examples
```jldoctest
julia> model = prunable(Chain(Dense(4 => 3, relu), Dropout(0.5), Dense(3 => 2)));

julia> model[1]
PrunableDense(4 => 3, relu; density=1.0)  # 15 parameters, plus 12 non-trainable

julia> model[2]
Dropout(0.5)
```
"""
function prunable(model)
    masks = IdDict() # tied layers are alike in weight, and must stay alike in mask
    mask(W) = get!(() -> unpruned_mask(W), masks, W)
    convert_layer(x) = x
    convert_layer(x::Dense) = PrunableDense(x, mask(x.weight))
    convert_layer(x::Conv) = PrunableConv(x, mask(x.weight))
    convert_layer(x::Cell) = with_matrices(W -> W isa AbstractMatrix ? PrunableDense(Dense(W, false), mask(W)) : W, x)
    return fmap(convert_layer, model; exclude = x -> x isa Cell || islayer(x))
end

"""
    unprunable(model)

The inverse of [`prunable`](@ref): the plain Flux layers with their weights, in which pruned entries are 0.
Parameters are shared, so training the result revives pruned weights.
"""
function unprunable(model)
    convert_layer(x) = x
    convert_layer(x::Prunable) = inner(mask!(x))
    convert_layer(x::Cell) = with_matrices(W -> W isa Prunable ? weight(mask!(W)) : W, x)
    return fmap(convert_layer, model; exclude = x -> x isa Cell || islayer(x))
end
