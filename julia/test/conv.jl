using Flux, PrunableFlux, Random, Test
using PrunableFlux: canonical, native

image_task(rng; size = 12, n = 20, classes = 4) =
    randn(rng, Float32, size, size, 2, n), Flux.onehotbatch(mod1.(1:n, classes), 1:classes)

"A small network as the papers' LeNet-5 and VGG: convolutions, pooling, batch normalisation, padding, flatten."
function lenet(rng; pad = 0, norm = true)
    init = (dims...) -> randn(rng, Float32, dims...) ./ 4
    model = prunable(Chain(
        Conv((3, 3), 2 => 6, relu; init, pad), norm ? BatchNorm(6, relu) : identity, MaxPool((2, 2)),
        Conv((2, 3), 6 => 5, tanh; init, pad, bias = false), MeanPool((2, 2)), Flux.flatten,
        Dense((pad == 0 ? 10 : 45) => 7, relu; init), Dropout(0.3), Dense(7 => 4; init)))
    for layer in prunables(model)
        PrunableFlux.bias(layer) === false || randn!(rng, PrunableFlux.bias(layer))
    end
    if norm
        foreach(v -> rand!(rng, v), (model[2].β, model[2].γ, model[2].μ, model[2].σ²))
    end
    return Flux.testmode!(model)
end

@testset "forward and gradient are those of the literal masked convolution" begin
    rng = Xoshiro(1)
    for kwargs in ((;), (; stride = 2, pad = 1), (; dilation = 2, bias = false), (; groups = 2)), T in (Float32, Float64)
        conv = Conv((3, 2), 4 => 6, tanh; kwargs...)
        conv = T == Float64 ? f64(conv) : conv
        mask = rand(rng, Bool, size(conv.weight))
        literal(W, x) = Conv(conv.σ, W .* mask, conv.bias, conv.stride, conv.pad, conv.dilation, conv.groups)(x)
        x = randn(rng, T, 9, 8, 4, 3)
        for stray in (zero(T), T(NaN), T(2))
            layer = PrunableConv(Conv(conv.σ, ifelse.(mask, conv.weight, stray), conv.bias, conv.stride, conv.pad,
                                      conv.dilation, conv.groups), mask)
            @test layer(x) ≈ literal(conv.weight, x)
            @test all(iszero, layer.conv.weight[.!mask])
        end
        layer = PrunableConv(deepcopy(conv), mask)
        g, gx = Flux.gradient((l, x) -> sum(abs2, l(x)), layer, x)
        expected, expected_x = Flux.gradient((W, x) -> sum(abs2, literal(W, x)), conv.weight, x)
        @test g.conv.weight ≈ expected && gx ≈ expected_x
        @test all(iszero, g.conv.weight[.!mask])
    end
    @test_throws DimensionMismatch PrunableConv(Conv((3, 3), 1 => 2), trues(3, 3, 2, 1))
    @test Flux.outputsize(PrunableConv((3, 3), 1 => 2), (8, 8, 1, 5)) == (6, 6, 2, 5)
end

@testset "canonical arrays are PyTorch's" begin
    layer = PrunableConv((2, 3), 4 => 5)
    W = randn(2, 3, 4, 5)
    C = canonical(layer, W)
    @test size(C) == (5, 4, 3, 2) # (out, in, height, width): a Julia image is (width, height)
    @test C[2, 3, 1, 1] == W[2, 3, 3, 2]
    @test native(layer, C) == W
    tied = PrunableConv(Conv(ones(Float32, 2, 1, 1, 2), false))
    prune!(tied, Magnitude(); sparsity = 0.25)
    @test tied.mask == reshape(Bool[1, 0, 1, 1], 2, 1, 1, 2)
end

criteria = (Magnitude(scaled = true), Taylor(), GraSP(per_class = 2), SynFlow(iterations = 3), OBS(iterations = 2),
            EdgePopup(training = Training(epochs = 1)))

@testset "$(nameof(typeof(criterion))) prunes convolutions" for criterion in criteria
    rng = Xoshiro(2)
    model, data = lenet(rng), image_task(rng)
    structure = criterion isa EdgePopup ? Layerwise() : Global()
    prune!(model, criterion, data; sparsity = 0.5, structure)
    @test sum(l -> count(l.mask), prunables(model)) ≈ 0.5 * sum(l -> length(l.mask), prunables(model)) atol = 2
    @test all(l -> all(iszero, PrunableFlux.weight(l)[.!l.mask]), prunables(model))
end

@testset "scores of convolutions" begin
    rng = Xoshiro(3)
    model, (x, y) = f64(lenet(rng; norm = false)), f64(image_task(rng))
    loss(m) = Flux.logitcrossentropy(m(x), y)
    gradient = Flux.gradient(loss, unprunable(model))[1]
    scores = saliency(Taylor(squared = false, batchsize = 20), model, (x, y))
    @test scores[1] ≈ abs.(gradient.layers[1].weight .* model[1].conv.weight)
    # a convolution as a dense layer of each patch
    conv = PrunableConv(Conv((3, 2), 2 => 4; bias = false))
    patch(i, j, n) = vec(x[i:(i + 2), j:(j + 1), :, n])
    patches = reduce(hcat, [patch(i, j, n) for n in 1:20 for j in 1:11 for i in 1:10])
    flat = PrunableDense(Float64.(permutedims(reshape(PrunableFlux.flipped(conv.conv.weight), :, 4))), false)
    to_conv(A) = PrunableFlux.flipped(reshape(permutedims(A), 3, 2, 2, 4))
    for criterion in (Wanda(), OBS())
        expected = to_conv(only(saliency(criterion, flat, (patches, nothing))))
        scale = criterion isa Wanda ? sqrt(110) : 1 # the mean over the places
        @test only(saliency(criterion, conv, (x, nothing))) .* scale ≈ expected
    end
    activation = saliency(Activation(), model, (x, y))
    @test map(length, activation) == [6, 5, 7, 4]
    @test activation[1] ≈ vec(sum(abs, model[1](x); dims = (1, 2, 4))) ./ (10 * 10 * 20)
    @test_throws ArgumentError saliency(SynFlow(), model)
    @test_throws ArgumentError saliency(OBD(), model, (x, y))
    @test_throws ArgumentError saliency(Redundancy(), model)
end

@testset "structures of convolutions" begin
    rng = Xoshiro(4)
    model = prune!(lenet(rng), Magnitude(); sparsity = 0.5, structure = PerOutput())
    @test all(==(9), sum(model[1].mask; dims = (1, 2, 3)))
    model = prune!(lenet(rng), Magnitude(); structure = NofM(1, 2, exclude = -1))
    @test all(==(1), sum(model[1].mask; dims = 3))
    @test_throws ArgumentError prune!(lenet(rng), Magnitude(); structure = NofM(1, 4))
    model = prune!(lenet(rng), Magnitude(); sparsity = 0.5, structure = Neurons())
    gone = [vec(.!any(l.mask; dims = (1, 2, 3))) for l in model.layers[[1, 4]]]
    @test sum(count, gone) + count(.!any(model[7].mask; dims = 2)) == 9
    @test !any(model[4].mask[:, :, gone[1], :])
    @test !any(reshape(model[7].mask, 7, 2, 5)[:, :, gone[2]])
end

@testset "compact ≡ masked, with convolutions: pad = $pad, norm = $norm, trial $trial" for
        pad in (0, 1), norm in (false, true), trial in 1:4
    rng = Xoshiro(trial)
    model, (x, y) = lenet(rng; pad, norm), image_task(rng)
    Base.CoreLogging.with_logger(Base.CoreLogging.NullLogger()) do
        prune!(model, Taylor(), (x, y); sparsity = 0.5, structure = Neurons())
        trial > 1 && prune!(model, Magnitude(); sparsity = rand(rng, (0.9, 0.95, 0.98)))
    end
    small = compact(model)
    @test small(x) ≈ model(x) rtol = 1e-4
    @test sum(l -> length(l.mask), prunables(small)) < 0.6 * sum(l -> length(l.mask), prunables(model))
    norm && @test small[2].chs == size(small[1].mask, 4) == length(small[2].γ)
    @test map(l -> size(l.mask), prunables(compact(small))) == map(l -> size(l.mask), prunables(small))
end

@testset "training keeps pruned weights of convolutions at 0" begin
    rng = Xoshiro(5)
    model, data = Flux.testmode!(lenet(rng), :auto), image_task(rng; n = 40)
    opt = Flux.setup(Adam(0.01), model)
    train_masked!(Flux.logitcrossentropy, model, Iterators.repeated(data, 10), opt)
    prune!(model, Magnitude(); sparsity = 0.7, opt)
    losses = train_masked!(Flux.logitcrossentropy, model, Iterators.repeated(data, 30), opt)
    @test losses[end] < losses[1]
    @test all(l -> all(iszero, PrunableFlux.weight(l)[.!l.mask]), prunables(model))
    history = iterative_prune!(Flux.testmode!(lenet(rng), :auto), data, data; schedule = [0.5], finetune = Reinitialize(),
                               training = Training(epochs = 2))
    @test history[2].sparsity ≈ 0.5 atol = 0.01
    plain = unprunable(model)
    @test plain[1] isa Conv && Flux.testmode!(plain)(data[1]) ≈ Flux.testmode!(model)(data[1])
end

@testset "compact follows constants part by part" begin
    rng = Xoshiro(3)
    x = randn(rng, Float32, 6, 6, 1, 5)
    norm(n, β) = Flux.testmode!(BatchNorm(relu, fill(Float32(β), n), ones(Float32, n), zeros(Float32, n), ones(Float32, n),
                                          1f-5, 0.1f0, true, true, nothing, n))
    conv(bias) = PrunableConv(Conv(randn(rng, Float32, 3, 3, 1, 4), fill(Float32(bias), 4)))
    dense(n) = PrunableDense(randn(rng, Float32, 3, n))
    filters(model) = size(model[1].mask, 4)
    function without_second(parts...)
        model = Chain(parts...)
        model[1].mask[:, :, :, 2] .= false
        mask!(model)
        small = compact(model)
        @test small(x) ≈ model(x) rtol = 1e-5
        return small
    end
    pool = MeanPool((2, 2); pad = 1)
    # 1 is padded with zeros, so that not all places are 0 after it, as the constant is
    @test filters(without_second(conv(1), pool, norm(4, -0.6), Flux.flatten, dense(36))) == 4
    @test filters(without_second(conv(0), pool, norm(4, 1), Flux.flatten, dense(36))) == 3
    small = without_second(conv(1), Flux.flatten, norm(64, 0.3), dense(64))
    @test filters(small) == 3 && small[3].chs == 48
end
